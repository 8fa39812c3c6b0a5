"""Several processes of one run on this machine:

    python launch/processes.py N COMMAND ...

Each gets the address of a coordinator on a free port, N and its number in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID, and DEVICES devices. Its lines are written with its number before them. SIGINT, SIGTERM and SIGHUP go to all.

When one fails, the others have GRACE seconds to notice and end by themselves, then SIGTERM, and soon after it SIGKILL. The exit
code is that of the first that failed on its own account: a failure before a stop (143, 130) before a notice of another's end (75).
"""
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Mapping, Sequence

NOTICED, STOPPED = 75, (143, 130)  # another process ended; asked to stop, and saved
LAST_SECONDS = 15  # between SIGTERM and SIGKILL for what has not ended within GRACE


def culprit(codes: Sequence[int]) -> int:
    """The exit code for a run whose processes ended with `codes`, in the order in which they ended."""
    failed = [code for code in codes if code]
    own = [code for code in failed if code != NOTICED and code not in STOPPED]
    stopped = [code for code in failed if code in STOPPED]
    return (own + stopped + failed + [0])[0]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(index: int, count: int, port: int, devices: int) -> Mapping[str, str]:
    ids = ",".join(str(index * devices + d) for d in range(devices))
    return {**os.environ, "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index), "JAX_NUM_CPU_DEVICES": str(devices), "JAX_LOCAL_DEVICE_IDS": ids}


def say(text: str) -> None:
    print(f"[launch] {text}", file=sys.stderr, flush=True)


def repeat(index: int, pipe) -> None:
    for line in pipe:  # in text mode, so that what a progress bar writes over itself is a line as well
        if line.strip():
            sys.stdout.write(f"[{index}] {line.rstrip()}\n")
            sys.stdout.flush()


def run(count: int, command: Sequence[str], *, devices: int = 1, grace: float = 150.0) -> int:
    """Start `count` processes of `command`, wait for all, and give the exit code."""
    seen = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, frame: seen.append(signum))
    port = free_port()
    # In groups of their own: a Ctrl-C of the terminal reaches them once, through this process.
    running = {i: subprocess.Popen(command, env=environment(i, count, port, devices), process_group=0, text=True, errors="replace",
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) for i in range(count)}
    readers = [threading.Thread(target=repeat, args=(i, process.stdout), daemon=True) for i, process in running.items()]
    for reader in readers:
        reader.start()
    codes, deadlines = [], []  # deadlines: (when, signal) for those that go on after a failure
    while running:
        while seen:
            signum = seen.pop(0)
            for process in running.values():
                process.send_signal(signum)
        for i, process in list(running.items()):
            if process.poll() is not None:
                code = process.returncode if process.returncode >= 0 else 128 - process.returncode
                codes.append(code)
                del running[i]
                if not code:
                    continue
                first = bool(running) and not deadlines
                say(f"process {i} ended with code {code}" + (f"; {grace:g} s for the other {len(running)} to end" if first else ""))
                if first:
                    end = time.monotonic() + grace
                    deadlines = [(end, signal.SIGTERM), (end + LAST_SECONDS, signal.SIGKILL)]
        if deadlines and time.monotonic() > deadlines[0][0]:
            _, signum = deadlines.pop(0)
            deadlines = deadlines or [(float("inf"), signal.SIGKILL)]
            say(f"{signum.name} to process {', '.join(map(str, running))}, still there")
            for process in running.values():
                process.send_signal(signum)
        time.sleep(0.1)
    for reader in readers:
        reader.join(timeout=5)  # a grandchild may hold the pipe open
    return culprit(codes)


def main(argv: Sequence[str]) -> int:
    try:
        count, devices, grace = int(argv[0]), int(os.environ.get("DEVICES", 1)), float(os.environ.get("GRACE", 150))
        if count < 1 or devices < 1 or not argv[1:]:
            raise ValueError
    except (IndexError, ValueError):
        print("error: give a number of processes and a command; DEVICES and GRACE are numbers: python launch/processes.py 2 COMMAND ...",
              file=sys.stderr)
        return 2
    return run(count, argv[1:], devices=devices, grace=grace)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
