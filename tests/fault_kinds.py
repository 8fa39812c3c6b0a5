"""The ways in which the fault campaign breaks a run, by name."""
import dataclasses
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import time
from typing import Callable, FrozenSet, List, Mapping, Optional, Sequence

import numpy as np

import ldm_jax.run
from launch.processes import environment, free_port
from tests.fault_config import KEEP, SAVE_EVERY, STEPS
from tests.forks import Lost, Process, main, metrics, steps, unfinished, until, wait, workers

RUNS = {"one": (1, "digits"), "folder": (1, "folder"), "two": (2, "digits")}  # name -> processes, variant of tests/fault_config.py


class Missed(Exception):
    """The run was past the moment that was aimed at."""


@dataclasses.dataclass(frozen=True)
class Unbroken:
    """A run without faults: its arrays and losses, and how many seconds it took."""
    workdir: str
    arrays: Mapping[str, np.ndarray]
    losses: Sequence[float]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Try:
    """What a fault is given: a folder with the run's workdir in it, what draws the moments, and the unbroken run."""
    folder: str
    rng: np.random.Generator
    run: str
    pictures: str
    unbroken: Unbroken
    started: List[Process] = dataclasses.field(default_factory=list)

    @property
    def workdir(self) -> str:
        return os.path.join(self.folder, "run")

    def start(self, *extra: str, run: Optional[str] = None, **options) -> List[Process]:
        """Start the run's processes."""
        processes = start(run or self.run, self.folder, self.workdir, self.pictures, *extra, **options)
        self.started.extend(processes)
        return processes

    def until(self, processes: Sequence[Process], condition: Callable[[], bool]) -> None:
        """Wait for a condition; Missed when the run ended first."""
        if not until(processes, condition):
            raise Missed(f"codes {[p.code for p in processes]}")

    def until_trained(self, processes: Sequence[Process], last: int = STEPS - 8) -> int:
        """Wait for the metrics of a step that is drawn, and up to a hundredth of a second; the step."""
        step = int(self.rng.integers(1, last))
        self.until(processes, lambda: len(metrics(self.workdir)) >= step)
        time.sleep(self.rng.uniform(0, 0.01))
        return step

    def stopped(self, step: int) -> None:
        """Make the workdir one that a kill after the checkpoint of `step` left, without the wait."""
        shutil.copytree(self.unbroken.workdir, self.workdir)
        for later in steps(self.workdir):
            if later > step:
                shutil.rmtree(os.path.join(self.workdir, "checkpoints", str(later)))


@dataclasses.dataclass(frozen=True)
class Struck:
    """What a fault did: when, in words, which checkpoints it damaged, and how long an asked stop took."""
    moment: str
    damaged: FrozenSet[int] = frozenset()
    seconds: Optional[float] = None


def start(run: str, folder: str, workdir: str, pictures: str, *extra: str, **options) -> List[Process]:
    count, variant = RUNS[run]
    arguments = [f"--config=tests/fault_config.py:{variant}", f"--workdir={workdir}", *extra]
    if variant == "folder":
        arguments.append(f"--config.data.folder.path={pictures}")
    port, number = free_port(), len(os.listdir(folder))
    said = [os.path.join(folder, f"said_{number}_{i}") for i in range(count)]
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    environs = [{name: environment(i, count, port, 1)[name] for name in names} if count > 1 else {} for i in range(count)]
    return [main(arguments, said[i], environ=environs[i], **options) for i in range(count)]


def kill(processes: Sequence[Process]) -> None:
    if all([process.poll() is not None for process in processes]):
        raise Missed(f"ended with {[process.code for process in processes]}")
    for process in processes:
        process.end()


def explained(process: Process, code: int, *says: str, threads: bool = False) -> None:
    """The exit code, and in the last two lines an error that says this; no traceback, but for what threads of Orbax print before it."""
    text = process.said()
    # Python's own tracker of resources speaks after a run whose workers were killed
    last = " ".join([line for line in text.strip().splitlines() if line.strip() and "resource_tracker" not in line][-2:])
    if process.code != code:
        raise Lost(f"exit code {process.code} in place of {code}: {last[-300:]}")
    if "Traceback" in text and not threads:
        raise Lost(f"a traceback: {last[-300:]}")
    missing = [word for word in ("error: ", *says) if word not in last]
    if missing:
        raise Lost(f"the error does not say {missing[0]!r}: {last[-300:]}")


# --- the run is killed, or asked to stop

def killed_anywhere(t: Try) -> Struck:
    moments = t.rng.uniform(0, t.unbroken.seconds, int(t.rng.integers(1, 4)))
    for seconds in moments:
        processes = t.start()
        time.sleep(seconds)
        kill(processes)
    return Struck(f"after {', '.join(f'{seconds:.1f}' for seconds in moments)} s")


def killed_in_training(t: Try) -> Struck:
    processes = t.start()
    step = t.until_trained(processes)
    kill(processes)
    return Struck(f"after step {step}")


def killed_in_a_save(t: Try) -> Struck:
    step = SAVE_EVERY * int(t.rng.integers(1, STEPS // SAVE_EVERY + 1))
    processes = t.start()
    t.until(processes, lambda: any(name.startswith(str(step)) for name in unfinished(t.workdir)))
    wait_ms = t.rng.uniform(0, 15)
    time.sleep(wait_ms / 1000)
    kill(processes)
    if not unfinished(t.workdir):
        raise Missed("the save was complete")
    return Struck(f"{wait_ms:.0f} ms into that of step {step}")


def killed_compiling(t: Try) -> Struck:
    """With an empty cache of compiled programs, which the next start then finds half filled."""
    cache = os.path.join(t.folder, "cache")
    processes, count = t.start(cache=cache), int(t.rng.integers(1, 12))
    t.until(processes, lambda: os.path.isdir(cache) and len(os.listdir(cache)) >= count)
    time.sleep(t.rng.uniform(0, 0.02))
    kill(processes)
    again = t.start(cache=cache)
    if wait(again) != [0] or "Traceback" in again[0].said():
        raise Lost(f"with what was left in the cache of compiled programs: {again[0].said()[-300:]}")
    return Struck(f"at program {count}")


def asked_to_stop(t: Try, signum: int) -> Struck:
    processes = t.start()
    step = t.until_trained(processes)
    asked = time.monotonic()
    for process in processes[:1]:
        process.send(signum)
    codes = wait(processes)
    seconds = time.monotonic() - asked
    if codes != [128 + signum] * len(codes):
        raise (Missed if set(codes) == {0} else Lost)(f"exit codes {codes} in place of {128 + signum}: {processes[0].said()[-300:]}")
    saved = steps(t.workdir)[-1]
    for process in processes:
        text = process.said()
        if f"stopped by {signal.Signals(signum).name} after step {saved}, saved in " not in text or "Traceback" in text:
            raise Lost(f"the newest checkpoint is {saved}, and it says: {text[-300:]}")
    if saved < step:
        raise Lost(f"asked after step {step}, and the newest checkpoint is {saved}")
    return Struck(f"after step {step}, stopped and saved at {saved} within {seconds:.2f} s", seconds=seconds)


# --- what was saved is damaged

def files_of(t: Try, step: int) -> List[str]:
    root = os.path.join(t.workdir, "checkpoints", str(step))
    return sorted(os.path.join(where, name) for where, _, names in os.walk(root) for name in names)


def is_array(path: str) -> bool:
    """Whether it is one of the files in which the arrays are."""
    return os.path.basename(os.path.dirname(path)) == "d"


def damaged(t: Try, damage: Callable[[str, np.random.Generator], str], chosen: Callable[[str], bool]) -> Struck:
    step = int(t.rng.choice(np.arange(STEPS - (KEEP - 2) * SAVE_EVERY, STEPS + 1, SAVE_EVERY)))
    t.stopped(step)
    path = str(t.rng.choice([path for path in files_of(t, step) if chosen(path) and os.path.getsize(path)]))
    what = damage(path, t.rng)
    return Struck(f"{what} in {os.path.relpath(path, os.path.join(t.workdir, 'checkpoints'))}"[:70], damaged=frozenset({step}))


def cut(path: str, rng: np.random.Generator) -> str:
    size = int(rng.integers(0, os.path.getsize(path)))
    os.truncate(path, size)
    return f"cut to {size} bytes"


def flip(path: str, rng: np.random.Generator) -> str:
    with open(path, "r+b") as f:
        data = bytearray(f.read())
        at, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[at] ^= 1 << bit
        f.seek(0)
        f.write(data)
    return f"bit {bit} of byte {at}"


def remove(path: str, rng: np.random.Generator) -> str:
    os.remove(path)
    return "removed"


def spoil(path: str, rng: np.random.Generator) -> str:
    """Cut, flip, overwrite or remove."""
    return [cut, flip, overwrite, remove][rng.integers(4)](path, rng)


def overwrite(path: str, rng: np.random.Generator) -> str:
    with open(path, "wb") as f:
        f.write(rng.bytes(40))
    return "overwritten"


def digest(workdir: str, step: int) -> str:
    """Of all files of a checkpoint."""
    root, total = os.path.join(workdir, "checkpoints", str(step)), hashlib.sha256()
    for path in sorted(files_under(root)):
        with open(path, "rb") as f:
            total.update(os.path.relpath(path, root).encode() + b"\0" + f.read())
    return total.hexdigest()


def half_removed(t: Try) -> Struck:
    t.stopped(STEPS - SAVE_EVERY)
    files = files_of(t, STEPS - SAVE_EVERY)
    gone = t.rng.permutation(files)[:len(files) // 2]
    for path in gone:
        os.remove(path)
    return Struck(f"{len(gone)} of {len(files)} files of step {STEPS - SAVE_EVERY}", damaged=frozenset({STEPS - SAVE_EVERY}))


def all_damaged(t: Try) -> Struck:
    """There is nothing to go on from, and the run says so and leaves everything as it is; with a copy put back it goes on."""
    t.stopped(STEPS - SAVE_EVERY)
    directory, there = os.path.join(t.workdir, "checkpoints"), steps(t.workdir)
    for step in there:
        cut(max(filter(is_array, files_of(t, step)), key=os.path.getsize), t.rng)
    before = {step: digest(t.workdir, step) for step in there}
    (process,) = t.start()
    wait([process])
    explained(process, 2, "none of the checkpoints", t.workdir, threads=True)
    if before != {step: digest(t.workdir, step) for step in steps(t.workdir)}:
        raise Lost("the damaged checkpoints were changed")
    back = int(t.rng.choice(there))
    shutil.rmtree(os.path.join(directory, str(back)))
    shutil.copytree(os.path.join(t.unbroken.workdir, "checkpoints", str(back)), os.path.join(directory, str(back)))
    return Struck(f"{there}, {back} put back", damaged=frozenset(there) - {back})


# --- what the run stands on gives way

def disk_full(t: Try) -> Struck:
    """A file system of its own that is too small, and then is made larger; where none may be mounted, a limit on the size of files."""
    used = sum(os.path.getsize(path) for path in files_under(t.unbroken.workdir))
    os.makedirs(t.workdir)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "faults", t.workdir], capture_output=True).returncode == 0:
        size = int(used * t.rng.uniform(0.3, 0.95)) // 4096 * 4
        subprocess.run(["mount", "-o", f"remount,size={size}k", t.workdir], check=True)
        moment, options = f"{size} KiB, where {used // 1024} are needed", {}
    else:
        size = max(map(os.path.getsize, files_under(t.unbroken.workdir)))
        moment, options = "no file beyond a limit", dict(file_limit=int(size * t.rng.uniform(0.2, 0.9)))
    (process,) = t.start(**options)
    if wait([process]) == [0]:
        raise Missed("it was large enough")
    explained(process, 2, t.workdir, "space", threads=True)
    moment += f", complete: {steps(t.workdir)}"
    if os.path.ismount(t.workdir):
        subprocess.run(["mount", "-o", "remount,size=100m", t.workdir], check=True)
    return Struck(moment)


def files_under(root: str) -> List[str]:
    return [os.path.join(where, name) for where, _, names in os.walk(root) for name in names]


def picture_spoilt(t: Try, spoilt: Callable[[str, np.random.Generator], str]) -> Struck:
    """A file of the data goes, or is damaged, while it is trained on: the run stops and names it. Then it is put back."""
    path = str(t.rng.choice(sorted(files_under(t.pictures))))
    with open(path, "rb") as f:
        before = f.read()
    (process,) = t.start()
    step = t.until_trained([process], last=STEPS // 2)
    try:
        what = spoilt(path, t.rng)
        if wait([process]) == [0]:
            raise Missed("it was not read again")
        explained(process, 2, path)
    finally:
        process.end()
        with open(path, "wb") as f:
            f.write(before)
    return Struck(f"{os.path.basename(path)} {what} after step {step}")


def decode_in_processes() -> None:
    """What `data.num_workers=1` does, here without being a change of the config."""
    ldm_jax.run.batches = functools.partial(ldm_jax.run.batches, num_workers=1)


def worker_killed(t: Try) -> Struck:
    (process,) = t.start(first=decode_in_processes)
    step = t.until_trained([process])
    found = workers(process)
    if not found:
        raise Missed("the worker had ended")
    os.kill(found[0], signal.SIGKILL)
    if wait([process]) == [0]:
        raise Missed("what was read ahead was enough")
    explained(process, 2, "a process that decodes data was ended by signal 9")
    return Struck(f"after step {step}")


# --- one of two processes

def one_killed(t: Try, index: int) -> Struck:
    processes = t.start()
    step = t.until_trained(processes)
    if any([process.poll() is not None for process in processes]):
        raise Missed("ended")
    processes[index].end()
    killed_at = time.monotonic()
    wait(processes)
    explained(processes[1 - index], 75, f"process {index} (", f"pid {processes[index].pid})", "died")
    return Struck(f"process {index} after step {step}, noticed in {time.monotonic() - killed_at:.1f} s")


def one_stopped(t: Try) -> Struck:
    processes, index = t.start("--process_timeout=5"), int(t.rng.integers(2))
    try:
        step = t.until_trained(processes)
        processes[index].send(signal.SIGSTOP)
        stopped_at = time.monotonic()
        wait([processes[1 - index]])
        seconds = time.monotonic() - stopped_at
        explained(processes[1 - index], 75, f"process {index} (", f"pid {processes[index].pid})", "silent for 5 s")
    finally:
        for process in processes:
            process.end()
    return Struck(f"process {index} after step {step}, noticed in {seconds:.1f} s")


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row of the table: of 100 tries how many, what happens, to which row of RUNS, and as which row it is started again."""
    weight: int
    strike: Callable[[Try], Struck]
    run: str = "one"
    again: str = ""


FAULTS = {
    "SIGKILL at any moment": Fault(10, killed_anywhere),
    "SIGKILL in training": Fault(8, killed_in_training),
    "SIGKILL inside a save": Fault(12, killed_in_a_save),
    "SIGKILL while compiling": Fault(2, killed_compiling),
    "SIGTERM": Fault(8, functools.partial(asked_to_stop, signum=signal.SIGTERM)),
    "SIGINT": Fault(4, functools.partial(asked_to_stop, signum=signal.SIGINT)),
    "array file cut off": Fault(6, functools.partial(damaged, damage=cut, chosen=is_array)),
    "bit flipped in an array file": Fault(8, functools.partial(damaged, damage=flip, chosen=is_array)),
    "other file of a checkpoint spoilt": Fault(8, functools.partial(damaged, damage=spoil, chosen=lambda path: not is_array(path))),
    "half of a checkpoint removed": Fault(3, half_removed),
    "all checkpoints damaged": Fault(2, all_damaged),
    "disk full": Fault(6, disk_full),
    "data file removed": Fault(3, functools.partial(picture_spoilt, spoilt=remove), "folder"),
    "data file damaged": Fault(2, functools.partial(picture_spoilt, spoilt=overwrite), "folder"),
    "SIGKILL to a process that decodes": Fault(2, worker_killed),
    "SIGKILL to process 1 of 2": Fault(4, functools.partial(one_killed, index=1), "two"),
    "SIGKILL to process 0 of 2": Fault(3, functools.partial(one_killed, index=0), "two"),
    "SIGSTOP to one of 2": Fault(2, one_stopped, "two"),
    "SIGKILL to both of 2 inside a save": Fault(3, killed_in_a_save, "two"),
    "SIGTERM to one of 2": Fault(2, functools.partial(asked_to_stop, signum=signal.SIGTERM), "two"),
    "SIGKILL to both of 2 and 1 started": Fault(1, killed_in_training, "two", "one"),
    "SIGKILL and 2 started": Fault(1, killed_in_training, "one", "two"),
}
