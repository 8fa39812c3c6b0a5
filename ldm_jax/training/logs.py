"""A run's numbers as JSON lines and TensorBoard events, and its progress on the screen."""
import contextlib
import json
import os
import sys
import time
from typing import Iterator, Mapping, Optional

from tqdm import tqdm

from ldm_jax.types import UserError, writes_files


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

    workdir None: writes nothing, as all processes of a run do but the first.
    """

    def __init__(self, workdir: Optional[str]):
        self._workdir, self._stack = workdir, contextlib.ExitStack()
        if workdir is None:
            return
        from tensorboardX.event_file_writer import EventsWriter  # SummaryWriter's thread dies of a full disk, and its queue then waits
        with writing(workdir):
            self._file = self._stack.enter_context(open(os.path.join(workdir, "metrics.jsonl"), "a", buffering=1))
            self._events = EventsWriter(os.path.join(workdir, "events"))
            self._stack.callback(self._events.close)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Raises UserError when they cannot be written."""
        if self._workdir is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar
        with writing(self._workdir):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            self._events.flush()

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
    if not os.path.exists(path):
        return
    with open(path, errors="replace") as f:
        lines = f.readlines()
    kept = list(_until(lines, step))
    if kept != lines:
        with writing(os.path.dirname(path)), open(path + ".tmp", "w") as f:
            f.writelines(kept)
        os.replace(path + ".tmp", path)


def _until(lines, step: int) -> Iterator[str]:
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                yield line
        except (ValueError, KeyError):
            continue


def progress(total: int, start: int, what: str) -> tqdm:
    """A bar with steps, time left, and room for the loss and images/s; a line every half minute where there is no terminal."""
    return tqdm(total=total, initial=start, desc=what, unit="step", dynamic_ncols=True, smoothing=0.05, file=sys.stderr, disable=not writes_files(),
                mininterval=0.5 if sys.stderr.isatty() else 30.0)
