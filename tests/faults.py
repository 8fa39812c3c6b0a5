"""The fault campaign: runs that are broken in every way the table FAULTS knows, started again, and compared with an unbroken one.

    python -m tests.faults [--tries=100] [--seed=0] [--only=KIND,...] [--number=N,...] [--markdown]

After each fault the same command is given again. A try is recovered when that start goes on from the newest good checkpoint, ends with
every array of the last checkpoint and every loss of the metrics bit for bit those of the unbroken run, has each step once in its metrics,
has left the earlier checkpoints as they were, and when every error on the way named its cause in a line. Otherwise it is lost, its
directory is kept, and the exit code is 1. Moments are drawn from (seed, number of the try); --number repeats single ones.
"""
import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np

from tests.fault_config import STEPS
from tests.fault_kinds import FAULTS, Missed, Struck, Try, Unbroken, digest, start
from tests.forks import Lost, begun_at, metrics, saved_arrays, steps, wait


def recover(t: Try, struck: Struck, again: str) -> None:
    """Give the command again, and raise Lost unless the run ends as the unbroken one did; `again` names a row of RUNS."""
    good = [step for step in steps(t.workdir) if step not in struck.damaged]
    before = {step: digest(t.workdir, step) for step in good}
    processes = t.start(run=again)
    codes, said = wait(processes), processes[0].said()
    if set(codes) != {0} or ("Traceback" in said and not struck.damaged):  # threads print their own when they read what is damaged
        raise Lost(f"started again it ends with {codes}: {said[-400:]}")
    begun = begun_at(said)
    begun = STEPS if begun is None else begun  # there was nothing left to do
    newest = max(good, default=0)
    if begun != newest and begun not in struck.damaged:  # some damage does not matter, such as that to a log
        raise Lost(f"it went on from step {begun}, and the newest good checkpoint was {newest}")
    for step in struck.damaged:
        if step > begun and f"checkpoint {step} in" not in said:
            raise Lost(f"the damaged checkpoint {step} was passed over without a word")
    for step in good:
        if f"checkpoint {step} in" in said:
            raise Lost(f"checkpoint {step} is damaged, and nobody meant to")
        if step in steps(t.workdir) and digest(t.workdir, step) != before[step]:
            raise Lost(f"checkpoint {step} was changed")
    lines = metrics(t.workdir)
    if [line["step"] for line in lines] != list(range(1, STEPS + 1)):
        raise Lost(f"the metrics are of the steps {[line['step'] for line in lines]}")
    compare(t, [line["loss"] for line in lines], exact=again == t.run)


def compare(t: Try, losses: Sequence[float], exact: bool) -> None:
    step, arrays = saved_arrays(t.workdir, t.folder)
    if step != STEPS or set(arrays) != set(t.unbroken.arrays):
        raise Lost(f"the last checkpoint is of step {step} and has {len(arrays)} arrays")
    for name, a in arrays.items():
        b = t.unbroken.arrays[name]
        same = a.tobytes() == b.tobytes() if exact else np.allclose(a, b, rtol=1e-3, atol=1e-4)
        if not same or a.shape != b.shape or a.dtype != b.dtype:
            raise Lost(f"{name} differs from the unbroken run's, by up to {np.max(np.abs(a.astype(np.float64) - b)):.2g}")
    if not (list(losses) == list(t.unbroken.losses) if exact else np.allclose(losses, t.unbroken.losses, rtol=1e-3)):
        raise Lost("the losses in the metrics differ from the unbroken run's")


# --- the campaign

def write_pictures(folder: str) -> str:
    """Digits as files, a directory per class: few, so that each is read again and again."""
    from PIL import Image
    from sklearn.datasets import load_digits
    data = load_digits()
    for i in range(160):
        directory = os.path.join(folder, "pictures", str(data.target[i]))
        os.makedirs(directory, exist_ok=True)
        Image.fromarray((data.images[i] * 15).astype(np.uint8)).save(os.path.join(directory, f"{i}.png"))
    return os.path.join(folder, "pictures")


def unbroken_run(folder: str, run: str, pictures: str) -> Unbroken:
    parts = os.path.join(folder, f"unbroken_{run}")
    os.makedirs(parts)
    workdir, began = os.path.join(parts, "run"), time.monotonic()
    processes = start(run, parts, workdir, pictures)
    if set(wait(processes)) != {0}:
        raise SystemExit(f"the unbroken run does not end well: {processes[0].said()[-2000:]}")
    seconds = time.monotonic() - began
    return Unbroken(workdir, saved_arrays(workdir, parts)[1], [line["loss"] for line in metrics(workdir)], seconds)


@dataclasses.dataclass(frozen=True)
class Campaign:
    """A folder for everything, the seed, and the unbroken runs, which are made when a fault first needs them."""
    folder: str
    seed: int
    pictures: str
    unbroken: dict

    def of(self, run: str) -> Unbroken:
        if run not in self.unbroken:
            self.unbroken[run] = unbroken_run(self.folder, run, self.pictures)
        return self.unbroken[run]


def begin(folder: str, seed: int) -> Campaign:
    return Campaign(folder, seed, write_pictures(folder), {})


def attempt(campaign: Campaign, number: int, kind: str) -> Tuple[str, str, Optional[float]]:
    """One try: ("recovered" or "lost", what happened, seconds that an asked stop took)."""
    fault = FAULTS[kind]
    unbroken, rng = campaign.of(fault.run), np.random.default_rng((campaign.seed, number))
    folder = os.path.join(campaign.folder, f"try_{number}")
    lost = None
    for _ in range(20):
        os.makedirs(folder)
        t = Try(folder, rng, fault.run, campaign.pictures, unbroken)
        try:
            struck = fault.strike(t)
            recover(t, struck, fault.again or fault.run)
            return "recovered", struck.moment, struck.seconds
        except Missed:
            continue  # and draw another moment
        except Lost as problem:
            lost = str(problem)
            return "lost", f"{lost} (in {folder})", None
        finally:
            for process in t.started:
                process.end()
            if lost is None:
                if os.path.ismount(t.workdir):
                    subprocess.run(["umount", t.workdir], check=True)
                shutil.rmtree(folder)
    return "lost", "the moment was missed twenty times", None


def plan(tries: int, seed: int, only: Sequence[str] = ()) -> List[str]:
    """The kinds of so many tries: in proportion to their weights, by largest remainders, each once where there is room, in an order that
    is drawn."""
    kinds = list(only or FAULTS)
    weights = np.array([FAULTS[kind].weight for kind in kinds], float)
    counts = np.zeros(len(kinds), int)
    for _ in range(tries):
        counts[np.argmax(np.where(counts == 0, np.inf, 0) + weights / (counts + 0.5))] += 1
    return list(np.random.default_rng(seed).permutation(np.repeat(kinds, counts)))


def run(campaign: Campaign, kinds: Sequence[str], numbers: Sequence[int] = (), say: Callable[[str], None] = print) -> List[tuple]:
    """Try after try, a line for each; (kind, outcome, seconds of a stop) of all."""
    done = []
    for number, kind in enumerate(kinds):
        if numbers and number not in numbers:
            continue
        began = time.monotonic()
        outcome, what, seconds = attempt(campaign, number, kind)
        done.append((kind, outcome, seconds))
        say(f"{number:4d}  {kind:36s} {outcome:10s} {time.monotonic() - began:5.1f} s  {what}")
    return done


def table(done: Sequence[tuple], markdown: bool = False) -> List[str]:
    """A row for each kind, and their sum."""
    count = lambda kind, outcomes: sum(k == kind and o in outcomes for k, o, _ in done)
    rows = [(kind, count(kind, ("recovered", "lost")), count(kind, ("recovered",)), count(kind, ("lost",))) for kind in FAULTS]
    rows = [row for row in rows if row[1]]
    rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
    if markdown:
        return ["| fault | tries | recovered | lost |", "|---|---:|---:|---:|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return [f"{'fault':36s} {'tries':>6} {'recovered':>10} {'lost':>5}", *(f"{a:36s} {b:6d} {c:10d} {d:5d}" for a, b, c, d in rows)]


def names(text: str) -> List[str]:
    chosen = [name for name in text.split(",") if name]
    unknown = [name for name in chosen if name not in FAULTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown kind {unknown[0]!r}; choose from: {'; '.join(FAULTS)}")
    return chosen


def command(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=names, default=[], metavar="KIND,...", help="; ".join(FAULTS))
    parser.add_argument("--number", type=lambda text: [int(n) for n in text.split(",")], default=[], metavar="N,...")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    args = parser.parse_args(argv)
    folder, began = tempfile.mkdtemp(prefix="faults_"), time.monotonic()
    done = run(begin(folder, args.seed), plan(args.tries, args.seed, args.only), args.number, lambda line: print(line, flush=True))
    print("\n" + "\n".join(table(done, args.markdown)))
    stops = [seconds for _, _, seconds in done if seconds is not None]
    if stops:
        print(f"\nfrom the signal to the end of the process, saved: median {np.median(stops):.2f} s, longest {max(stops):.2f} s")
    print(f"{len(done)} tries in {(time.monotonic() - began) / 60:.1f} minutes, seed {args.seed}")
    lost = any(outcome == "lost" for _, outcome, _ in done)
    if not lost:
        shutil.rmtree(folder)
    return int(lost)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
