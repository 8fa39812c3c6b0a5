"""A run's numbers as JSON lines and TensorBoard events, and its progress on the screen."""
import contextlib
import json
import os
import sys
import tempfile
import time
from typing import Any, Iterator, Mapping, Optional

from tqdm import tqdm

from ldm_jax import paths
from ldm_jax.types import UserError, writes_files

METRICS = "metrics.jsonl"
UPLOAD_S = 30.0


class Logs:
    """Writes scalars to DIR/metrics.jsonl and DIR/events.out.tfevents.*, appending to what an earlier start of the run wrote.

    Objects in a bucket cannot be appended to: there both files grow on this machine, and are copied to DIR every UPLOAD_S seconds, at
    `flush` and at the end.

    workdir None: writes nothing, as all processes of a run do but the first.
    """

    def __init__(self, workdir: Optional[str]):
        if workdir is None:
            self._file = self._events = self._there = None
            return
        from tensorboardX import SummaryWriter
        self._there = workdir if paths.is_remote(workdir) else None
        self._scratch = tempfile.TemporaryDirectory(prefix="ldm_jax-") if self._there else None
        self._here, self._copied, self._sizes = self._scratch.name if self._there else workdir, time.monotonic(), {}
        if self._there:
            with contextlib.suppress(FileNotFoundError), open(os.path.join(self._here, METRICS), "wb") as f:
                f.write(paths.read_bytes(os.path.join(workdir, METRICS)))
        self._file = open(os.path.join(self._here, METRICS), "a", buffering=1)
        self._events = SummaryWriter(self._here)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """values: name -> number, or -> a mapping of names to numbers, in TensorBoard a group of its own."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            named = {f"{name}/{part}": number for part, number in value.items()} if isinstance(value, Mapping) else {name: value}
            for full, number in named.items():
                self._events.add_scalar(full, number, step)
        if self._there and time.monotonic() - self._copied > UPLOAD_S:
            with contextlib.suppress(UserError):  # the next copy has all that this one would have had
                self.flush()

    def flush(self) -> None:
        """Bring the files in a bucket up to date, so that they are ahead of a checkpoint that is saved next."""
        if not self._there:
            return
        self._copied = time.monotonic()
        self._events.flush()
        for name in sorted(os.listdir(self._here)):
            size = os.path.getsize(os.path.join(self._here, name))
            if self._sizes.get(name) != size:
                paths.upload(os.path.join(self._here, name), os.path.join(self._there, name))
                self._sizes[name] = size

    def close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._events.close()
        if self._there:
            with self._scratch:
                self.flush()

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def drop_after(path: str, step: int) -> None:
    """Remove the lines of a metrics.jsonl beyond `step`, which a resumed run will write again; half-written lines go too."""
    try:
        lines = paths.read_text(path).splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = list(_until(lines, step))
    if kept != lines:
        paths.write_text(path, "".join(kept))


def _until(lines, step: int) -> Iterator[str]:
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                yield line
        except (ValueError, KeyError):
            continue


def progress(total: int, start: int, what: str) -> tqdm:
    """A bar with steps, time left, and room for the loss and images/s; a line every half minute where there is no terminal."""
    return tqdm(total=total, initial=start, desc=what, unit="step", dynamic_ncols=True, smoothing=0.05, file=sys.stderr,
                disable=not writes_files(), mininterval=0.5 if sys.stderr.isatty() else 30.0)
