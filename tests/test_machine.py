"""What the compiler and the allocator are told."""
import os

import jax
import numpy as np
import pytest

from ldm_jax import machine
from tests.models.tiny import random_params

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def untold(monkeypatch):
    """JAX as it starts where nobody has told it of a cache."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update(NAMES[0], None)
    jax.config.update(NAMES[1], 1.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_is_the_users(untold, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ldm_jax" / "compiled")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
    assert os.listdir(jax.config.jax_compilation_cache_dir) == []


def test_the_cache_is_at_home_without_xdg(untold, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    machine.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "ldm_jax" / "compiled")


def test_what_jax_was_told_stands(untold, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
    jax.config.update("jax_compilation_cache_dir", "gs://elsewhere/cache")  # as JAX_COMPILATION_CACHE_DIR does when JAX is imported
    machine.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "gs://elsewhere/cache" and os.listdir(tmp_path) == []
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0


def test_a_directory_that_cannot_be_made_is_gone_without(untold, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_on_cpu_barriers_last_until_code_is_made():
    def f(x):
        return jax.lax.optimization_barrier(x + 1) * 2

    for options, kept in ((machine.compiler_options(), True), ({}, False)):
        text = jax.jit(f, compiler_options=options).lower(jax.numpy.ones(8)).compile().as_text()
        assert ("opt-barrier" in text) == kept


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(machine, "_ON_CPU", {"xla_of_another_age": "1", "xla_disable_hlo_passes": "cse_barrier_expander"})
    machine._known.cache_clear()
    assert machine.compiler_options() == {"xla_disable_hlo_passes": "cse_barrier_expander"}
    machine._known.cache_clear()


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_a_step_is_the_same_with_the_options_and_without(name):
    """And the sums of residual branches are not computed again in every block: without the options work grows as depth squared."""
    from ldm_jax.models.dit import dit
    from ldm_jax.models.unet import unet
    net = dit((8, 8, 2), width=16, depth=6, num_heads=2) if name == "dit" else unet(
        (8, 8, 2), width=8, mults=(1, 2), num_res_blocks=1, attention=(4,), num_heads=2)
    params = random_params(net)
    x, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 2)), jax.numpy.full(2, 0.5)

    def gradient(params, x):
        return jax.value_and_grad(lambda params: jax.numpy.mean(net.apply(params, x, t) ** 2))(params)

    with_options, without = (jax.jit(gradient, compiler_options=options)(params, x) for options in (machine.compiler_options(), {}))
    with_options, without = jax.tree.map(np.asarray, (with_options, without))
    largest = max(np.abs(a).max() for a in jax.tree.leaves(without))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), with_options, without)


def test_freed_memory_is_kept():
    """Pages that a process has had once it does not ask the kernel for again."""
    import subprocess
    import sys
    code = """
import resource, numpy as np
from ldm_jax import machine
machine.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24).sum()  # 128 MiB, 32,768 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    root = os.path.dirname(os.path.dirname(machine.__file__))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    if "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"):
        pytest.skip("the GNU C library alone")
    assert int(out.stdout) < 3000, out.stderr
