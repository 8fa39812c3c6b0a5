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


@contextlib.contextmanager
def writing(workdir: str):
    """Raises UserError, naming the directory, for what goes wrong in writing to it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir!r}: {error.strerror or error}; free some space or mend the permissions and "
                        f"run the same command again, or choose another --workdir") from error


class Logs:
    """Writes scalars to DIR/metrics.jsonl and DIR/events.out.tfevents.*, appending to what an earlier start of the run wrote.

    Objects in a bucket cannot be appended to: there both files grow on this machine, and are copied to DIR every UPLOAD_S seconds, at
    `flush` and at the end.

    workdir None: writes nothing, as all processes of a run do but the first.
    """

    def __init__(self, workdir: Optional[str]):
        self._workdir, self._stack = workdir, contextlib.ExitStack()
        self._there = workdir if workdir and paths.is_remote(workdir) else None
        if workdir is None:
            return
        from tensorboardX.event_file_writer import EventsWriter  # SummaryWriter's thread dies of a full disk, and its queue then waits
        self._copied, self._sizes = time.monotonic(), {}
        self._here = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ldm_jax-")) if self._there else workdir
        with writing(workdir):
            if self._there:
                with contextlib.suppress(FileNotFoundError), open(os.path.join(self._here, METRICS), "wb") as f:
                    f.write(paths.read_bytes(os.path.join(workdir, METRICS)))
                self._stack.callback(self.flush)
            self._file = self._stack.enter_context(open(os.path.join(self._here, METRICS), "a", buffering=1))
            self._events = EventsWriter(os.path.join(self._here, "events"))
            self._stack.callback(self._events.close)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """values: name -> number, or -> a mapping of names to numbers, in TensorBoard a group of its own.

        Raises:
          UserError: when they cannot be written.
        """
        if self._workdir is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar
        with writing(self._workdir):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                named = {f"{name}/{part}": number for part, number in value.items()} if isinstance(value, Mapping) else {name: value}
                for full, number in named.items():
                    self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(full, number)))
            self._events.flush()
        if self._there and time.monotonic() - self._copied > UPLOAD_S:
            with contextlib.suppress(UserError):  # the next copy has all that this one would have had
                self.flush()

    def flush(self) -> None:
        """Bring the files in a bucket up to date, so that they are ahead of a checkpoint that is saved next."""
        if not self._there:
            return
        self._copied = time.monotonic()
        for name in sorted(os.listdir(self._here)):
            size = os.path.getsize(os.path.join(self._here, name))
            if self._sizes.get(name) != size:
                paths.upload(os.path.join(self._here, name), os.path.join(self._there, name))
                self._sizes[name] = size

    def close(self) -> None:
        with writing(self._workdir):
            self._stack.close()

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except UserError:
            if error is None:
                raise


def drop_after(path: str, step: int) -> None:
    """Remove the lines of a metrics.jsonl beyond `step`, which a resumed run will write again; half-written lines go too.

    Raises:
      UserError: when it cannot be written.
    """
    try:
        lines = paths.read_bytes(path).decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = list(_until(lines, step))
    if kept != lines:
        with writing(os.path.dirname(path)):
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
