"""Shared test settings: the repository root on the path, eight virtual CPU devices, and no skips where none are allowed."""
import gc
import importlib.metadata
import os
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

# compile quickly rather than well: small tests spend most of their time in the compiler
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a third of the compiler's time; later ones know the flag no more, and stop
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small arrays: PyTorch's other threads would only wait, and busily

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
CACHE = os.path.join(os.path.expanduser("~"), ".cache", "ldm_jax", "tests")  # what was compiled once need not be in the next run
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_collection_modifyitems(items):
    """The files of slow tests first: begun last, they would keep one core busy when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish(session):
    """What is imported stays: the garbage collector need not walk through it again and again while programs are traced."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _no_skips(report):
    """With LDM_JAX_NO_SKIPS set, what skips for want of a package fails instead."""
    if report.skipped and os.environ.get("LDM_JAX_NO_SKIPS") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where everything should be installed: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    _no_skips((yield).get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    _no_skips((yield).get_result())
