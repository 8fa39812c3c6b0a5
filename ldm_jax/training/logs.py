"""A run's numbers as JSON lines and TensorBoard events, and its progress on the screen."""
import json
import os
import sys
from typing import Any, Iterator, Mapping, Optional

from tqdm import tqdm

from ldm_jax.types import writes_files


class Logs:
    """Writes scalars to DIR/metrics.jsonl and DIR/events.out.tfevents.*, appending to what an earlier start of the run wrote.

    workdir None: writes nothing, as all processes of a run do but the first.
    """

    def __init__(self, workdir: Optional[str]):
        if workdir is None:
            self._file = self._events = None
            return
        from tensorboardX import SummaryWriter
        self._file = open(os.path.join(workdir, "metrics.jsonl"), "a", buffering=1)
        self._events = SummaryWriter(workdir)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """values: name -> number, or -> a mapping of names to numbers, in TensorBoard a group of its own."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            named = {f"{name}/{part}": number for part, number in value.items()} if isinstance(value, Mapping) else {name: value}
            for full, number in named.items():
                self._events.add_scalar(full, number, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._events.close()

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def drop_after(path: str, step: int) -> None:
    """Remove the lines of a metrics.jsonl beyond `step`, which a resumed run will write again; half-written lines go too."""
    if not os.path.exists(path):
        return
    with open(path) as f:
        lines = f.readlines()
    kept = list(_until(lines, step))
    if kept != lines:
        with open(path + ".tmp", "w") as f:
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
    return tqdm(total=total, initial=start, desc=what, unit="step", dynamic_ncols=True, smoothing=0.05, file=sys.stderr,
                disable=not writes_files(), mininterval=0.5 if sys.stderr.isatty() else 30.0)
