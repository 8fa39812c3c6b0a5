"""The recipes of configs/ for tests, and the command line as a user starts it."""
import importlib.util
import json
import os
import subprocess
import sys

from tests.conftest import CACHE, ROOT


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


FORKS = """
import json, os, runpy, sys
import ldm_jax.run
folder, codes = sys.argv[1], []
for i, line in enumerate(json.load(sys.stdin)):
    pid = os.fork()
    if pid == 0:
        for descriptor in (1, 2):
            os.dup2(os.open(f"{folder}/{i}.{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv[1:] = line
        runpy.run_module("ldm_jax.main", run_name="__main__", alter_sys=True)
        sys.exit()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""


def mains(lines, folder):
    """Run short command lines, each as `python -m ldm_jax.main` does, in forks of one process: most of their time would be imports."""
    done = subprocess.run([sys.executable, "-c", FORKS, str(folder)], cwd=ROOT, env=environment(), input=json.dumps(lines),
                          stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    said = [[(folder / f"{i}.{descriptor}").read_text() for descriptor in (1, 2)] for i in range(len(lines))]
    return [subprocess.CompletedProcess(line, code, *texts) for line, code, texts in zip(lines, json.loads(done.stdout), said)]
