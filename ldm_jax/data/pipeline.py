"""Batches for the training loop: shuffled, split over processes, read ahead, placed on the devices, and resumable.

The order is one endless stream of examples: epoch e is a permutation of the whole source drawn from (seed, e), and
batch k is the examples at positions k B ... (k + 1) B - 1 of that stream, so an epoch need not end with a batch and every
example comes exactly once per epoch. A process reads the share of each batch that its devices hold. Batch k is
therefore a function of (seed, k, B) alone: the same examples, in the same order and mirrored alike, on any number of
processes.
"""
import atexit
import re
import weakref
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Tuple

import numpy as np

from ldm_jax.data.base import Source, spatial
from ldm_jax.types import UserError

_OPEN = weakref.WeakSet()

READ_AHEAD = 4  # batches decoded before they are asked for
PLACED_AHEAD = 2  # batches already on the devices


class Batches:
    """An endless iterator over dicts of arrays: "image" uint8 [B, H, W, C], for a labelled source "class" int32 [B], and the
    source's further fields.

    Its state is the index of the next batch. Call close() (or use it as a context manager) when done, to free the batches
    read ahead.
    """

    def __init__(self, make: Callable[[int], Iterable[Mapping[str, Any]]], start: int, ids: Callable[[int], np.ndarray]):
        self._make, self._it, self._next, self._ids = make, None, start, ids
        _OPEN.add(self)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Mapping[str, Any]:
        if self._make is None:
            raise ValueError("this iterator of batches has been closed")
        if self._it is None:
            self._it = iter(self._make(self._next))
        try:
            batch = next(self._it)
        except RuntimeError as error:
            code = re.search(r"[Ww]orker process was terminated unexpectedly with exit code (-?\d+)", str(error))
            if not code:
                raise
            how = f"was ended by signal {-int(code[1])}" if int(code[1]) < 0 else f"ended with code {code[1]}"
            raise UserError(f"a process that decodes data {how}, as where memory runs out; the same command goes on from the last "
                            f"checkpoint") from error
        self._next += 1
        return batch

    def get_state(self) -> Dict[str, int]:
        """{"next_index": k}: the batch that next() gives next."""
        return {"next_index": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go to where get_state() was taken, on any number of processes."""
        self._stop()
        self._next = int(state["next_index"])

    def ids(self, k: int) -> np.ndarray:
        """Which of the source's examples batch k consists of, int64 [B]: the whole batch, on every process."""
        return self._ids(k)

    def _stop(self) -> None:
        if self._it is not None:
            self._it.close()
            self._it = None

    def close(self) -> None:
        """End the reading threads and let go of every queued array."""
        self._stop()
        self._make = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@atexit.register
def _close_all() -> None:
    """Device arrays still queued in a reading thread when the interpreter goes down can abort the process."""
    for it in list(_OPEN):
        it.close()


def permuted(size: int, seed: int, first: int, end: int) -> np.ndarray:
    """The examples at positions first ... end - 1 of the endless stream over `size` of them, int64.

    They are those of grain.MapDataset.range(size).seed(seed).shuffle().repeat(), which Grain looks up through objects for each stage,
    one number at a time: that took longer than all else that a batch of small pictures needs.
    """
    from grain.experimental import index_shuffle

    base = int(np.random.SeedSequence((seed, 1)).generate_state(1, np.uint32)[0])  # as Grain derives it for what comes after .seed
    return np.array([index_shuffle(i % size, max_index=size - 1, seed=(base + i // size) % 2**32, rounds=4) for i in range(first, end)],
                    np.int64)


def batches(source: Source, *, batch_size: int, seed: int, place: Optional[Callable[[np.ndarray, int, int], Any]] = None,
            share: Tuple[int, int] = (0, 1), flip: bool = False, start: int = 0, num_workers: int = 0) -> Batches:
    """Batch start, start + 1, ... of the source, without end.

    Args:
      batch_size: B, over all processes. A B greater than the source takes from several epochs.
      seed: 0 .. 2^32 - 1; draws the order of every epoch and the mirroring.
      share: (i, n): this process reads the i-th of n equal parts of each batch.
      place: (rows first ... of an array, first, B) -> the array of the whole batch on the devices, see `parallel.sharding.place`.
        None: numpy arrays, this process's B / n examples only.
      flip: mirror each image left to right with probability 1/2, and with it the fields that follow the picture.
      num_workers: processes that decode. 0, decoding in a thread, starts at once and is right for small images; a worker
        takes seconds to start and pays where decoding is the bottleneck.

    Raises:
      UserError: a batch that the processes cannot share equally, a number out of range, or flip where a field would be untrue.
    """
    index, shares = share
    if batch_size < 1 or batch_size % shares:
        raise UserError(f"batch_size {batch_size} must be a positive multiple of {shares}, the shares of the processes")
    if not 0 <= index < shares:
        raise UserError(f"share {share} must be (i, n) with 0 <= i < n")
    if not 0 <= seed < 2**32:
        raise UserError(f"data seed {seed} must be in 0..{2**32 - 1}")
    if start < 0:
        raise UserError(f"start {start} must be the index of a batch, 0 or more")
    if num_workers < 0:
        raise UserError(f"num_workers {num_workers} (data.num_workers) must be 0, to decode in a thread, or a number of processes")
    if source.size < 1:
        raise UserError(f"data source {source.name!r} has no images")
    mine = batch_size // shares
    names = spatial(source) if flip else ()

    def read(k: Any) -> Mapping[str, np.ndarray]:
        k = int(k)
        begin = k * batch_size + index * mine  # the shares of one step, laid side by side, are that step's batch of a single process
        batch = dict(source.read(permuted(source.size, seed, begin, begin + mine).tolist()))
        if flip:
            mirrored = np.random.default_rng((seed, k)).random(batch_size)[index * mine:][:mine] < 0.5
            for name in names:
                batch[name][mirrored] = batch[name][mirrored, :, ::-1]
        return batch

    def own(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return {name: np.array(a) for name, a in batch.items()}  # out of the memory shared with the worker, which is then freed

    def placed(batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        return {name: place(a, index * mine, batch_size) for name, a in batch.items()}

    def ids(k: int) -> np.ndarray:
        return permuted(source.size, seed, k * batch_size, (k + 1) * batch_size)

    def make(first: int):
        import grain

        numbers = grain.MapDataset.range(first, 2**62)
        stream = numbers.map(read).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD))
        if num_workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own here, which outside app.run nobody has parsed
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers)).map(own)
        if place is not None:
            stream = stream.map(placed)
        return grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=PLACED_AHEAD)

    return Batches(make, start, ids)
