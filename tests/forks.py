"""Runs of the command line that begin without their imports: forks of a process that has not yet asked JAX for a device."""
import atexit
import contextlib
import dataclasses
import glob
import json
import os
import re
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
from typing import Callable, List, Mapping, Optional, Sequence, Tuple

import grain  # noqa: F401  what a run imports late is imported here, once
import jax
import numpy as np
import sklearn.datasets  # noqa: F401
import tensorboardX  # noqa: F401
from orbax.checkpoint import v1 as _  # noqa: F401
from PIL import Image  # noqa: F401

import ldm_jax.run  # noqa: F401
from tests.runs import CACHE

LIMIT = 240.0  # seconds after which a run hangs; one takes ten at most, on cores that nothing else wants


class Lost(Exception):
    """The promise that was broken."""


@dataclasses.dataclass
class Process:
    """A child: like subprocess.Popen, with what it says in a file."""
    pid: int
    path: str
    code: Optional[int] = None

    def poll(self) -> Optional[int]:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def end(self) -> None:
        if self.poll() is None:
            self.send(signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def said(self) -> str:
        with open(self.path, errors="replace") as f:
            return f.read()


def fork(work: Callable[[], None], said: str, *, environ: Mapping[str, str] = {}, cache: str = CACHE,
         file_limit: Optional[int] = None) -> Process:
    """Start `work` in a child as a script of its own: output to the file `said`, the interpreter's usual end, an exit code.

    environ: added to the child's environment. cache: of compiled programs. file_limit: bytes that no file may grow beyond.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(pid, said)
    code = 1
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for n in (1, 2):
            os.dup2(descriptor, n)
        os.environ.update(environ)
        for name, value in {"jax_platforms": "cpu", "jax_num_cpu_devices": 1, "jax_compilation_cache_dir": cache,
                            "jax_persistent_cache_min_compile_time_secs": 0.0}.items():
            jax.config.update(name, value)
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no further up: what the parent's frames would clean up is not the child's


def main(arguments: Sequence[str], said: str, *, first: Callable[[], None] = lambda: None, **options) -> Process:
    """Start `python -m ldm_jax.main` with these arguments; see `fork`. `first` is called in the child before."""
    def work():
        first()
        sys.argv[1:] = arguments
        runpy.run_module("ldm_jax.main", run_name="__main__", alter_sys=True)

    return fork(work, said, **options)


def workers(process: Process) -> List[int]:
    """The pids of the processes that Python's multiprocessing runs for this one."""
    found = []
    for path in glob.glob(f"/proc/{process.pid}/task/*/children"):  # of each thread
        with contextlib.suppress(OSError), open(path) as children:
            for pid in children.read().split():
                with open(f"/proc/{pid}/cmdline") as line:
                    found += [int(pid)] if "spawn_main" in line.read() else []
    return found


def wait(processes: Sequence[Process], limit: float = LIMIT) -> List[int]:
    """The exit codes; Lost where one does not end."""
    until(processes, lambda: False, limit)
    return [process.code for process in processes]


def until(processes: Sequence[Process], condition: Callable[[], bool], limit: float = LIMIT) -> bool:
    """Wait for a condition; whether it came before all processes had ended. Lost where neither happens."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if condition():
            return True
        if all([process.poll() is not None for process in processes]):
            return False
        time.sleep(0.002)
    running = [str(i) for i, process in enumerate(processes) if process.poll() is None]
    for process in processes:
        process.end()
    raise Lost(f"process {', '.join(running)} was still there after {limit:.0f} s")


def steps(workdir: str) -> List[int]:
    """The complete checkpoints."""
    directory = os.path.join(workdir, "checkpoints")
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit()) if os.path.isdir(directory) else []


def unfinished(workdir: str) -> List[str]:
    """The checkpoints that are being written."""
    directory = os.path.join(workdir, "checkpoints")
    return [name for name in os.listdir(directory) if "tmp" in name] if os.path.isdir(directory) else []


def metrics(workdir: str) -> List[dict]:
    """The whole lines of metrics.jsonl."""
    try:
        with open(os.path.join(workdir, "metrics.jsonl")) as f:
            return [json.loads(line) for line in f if line.endswith("\n")]
    except FileNotFoundError:
        return []


def begun_at(said: str) -> Optional[int]:
    """The step at which a start's progress bar began."""
    found = re.search(r"(\d+)/\d+ \[", said)
    return found and int(found[1])


def saved_arrays(workdir: str, folder: str) -> Tuple[int, Mapping[str, np.ndarray]]:
    """(step, path -> array): all that the newest checkpoint holds, verified as a start of the run verifies it."""
    path = os.path.join(folder, "arrays.npz")

    def work():
        from ldm_jax.training.checkpoint import Checkpoints
        with Checkpoints(os.path.join(workdir, "checkpoints"), read_only=True) as checkpoints:
            state, _ = checkpoints.load(checkpoints.steps[-1], checkpoints.saved())
        flat = jax.tree_util.tree_flatten_with_path(state)[0]
        np.savez(path, **{jax.tree_util.keystr(where, simple=True, separator="."): np.asarray(a) for where, a in flat})

    reader = fork(work, os.path.join(folder, "reader"))
    if wait([reader]) != [0]:
        raise Lost(f"the last checkpoint cannot be read: {reader.said().strip().splitlines()[-1:]}")
    with np.load(path) as arrays:
        return steps(workdir)[-1], dict(arrays)
