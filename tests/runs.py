"""The recipes of configs/ for tests, and the command line as a user starts it."""
import importlib.util
import os
import subprocess
import sys

from tests.conftest import ROOT

CACHE = os.path.join(os.path.expanduser("~"), ".cache", "ldm_jax", "tests")


def config(name, variant=""):
    spec = importlib.util.spec_from_file_location(name, os.path.join(ROOT, "configs", f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def smoke(name):
    return config(name, "smoke").to_dict()


def command(*arguments):
    return [sys.executable, "-m", "ldm_jax.main", *arguments]


def environment(**more):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": CACHE,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **more}


def main(*arguments, shell_prefix=None, **more):
    """Run the command line to its end."""
    line = command(*arguments)
    if shell_prefix:
        line = ["sh", "-c", f'{shell_prefix}; exec "$@"', "sh", *line]
    return subprocess.run(line, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=300)
