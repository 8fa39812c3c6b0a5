"""--suite=input: the pictures that the pipeline delivers beside those that an update takes, and what a loop waits for them.

The pipeline is that of a run on CIFAR-10, mirrored and placed on the devices; where no copy is found, on drawn shapes of the same size.
"""
import functools
import time
from typing import List, Tuple

import jax

from ldm_jax import recipe
from ldm_jax.benchmark import nets, timing
from ldm_jax.benchmark.report import Row
from ldm_jax.benchmark.settings import Settings
from ldm_jax.benchmark.training import Updates, size_of, unasked, updates_of
from ldm_jax.data import Source, batches
from ldm_jax.parallel.sharding import placer

BATCH = 128
READ, DECODED = 200, 40  # batches that are timed, from memory and with their decoding
STEPS, SECONDS = 100, 10.0  # of a loop, whichever comes first


def run(name: str, case: nets.Case, settings: Settings) -> List[Row]:
    if unasked(case, settings):
        return []
    size, updates = size_of(case, settings), updates_of(case, settings)
    put = placer(updates.mesh)
    decoded, kept = sources()
    delivered = [rate(kept, put, READ) for _ in range(settings.rounds)]
    first = [rate(decoded, put, DECODED) for _ in range(settings.rounds)]
    taken = timing.alternate({"": updates.wait}, settings.rounds, warm=2)[""]
    consumed, (whole, waited) = [size / seconds for seconds in taken], loop(updates, kept, put, size)
    facts = {"batch": size, "dtype": settings.dtype, "data": kept.name}
    ratio, at_first = timing.ratios(consumed, delivered), timing.ratios(consumed, first)
    return [_row(name, f"pipeline, batch {BATCH}, from memory", delivered, {"data": kept.name}),
            _row(name, f"pipeline, batch {BATCH}, first epoch", first, {"data": kept.name}),
            _row(name, f"update, batch {size}", consumed, facts),
            Row("input", name, "delivered from memory for each one taken", ratio[0], "times", *ratio[1:]),
            Row("input", name, "delivered in the first epoch for each one taken", at_first[0], "times", *at_first[1:]),
            Row("input", name, "waiting for a batch in the loop", 1e3 * waited, "ms", detail={"step_ms": 1e3 * whole, **facts}),
            Row("input", name, "of the loop's time", 100 * waited / whole, "%"),
            Row("input", name, "sent to the devices", wire(kept), "bytes/image")]


def _row(name: str, what: str, rates: List[float], detail: dict) -> Row:
    median, low, high = timing.spread(rates)
    return Row("input", name, what, median, "images/s", low, high, detail={**detail, "rates": rates})


@functools.lru_cache(maxsize=None)
def sources() -> Tuple[Source, Source]:
    """(the train split as its first epoch finds it, the same when all of it has been read)."""
    data = {**recipe.cifar10_or_shapes(), "image_shape": (32, 32, 3), "num_classes": 10}
    decoded, kept = (recipe.build_source({**data, data["name"]: {**data[data["name"]], "cache": cache}}, "train")
                     for cache in (False, True))
    kept.read(range(kept.size))
    return decoded, kept


def rate(source: Source, put, count: int) -> float:
    """Images/s over `count` batches, the last of them on the devices."""
    with batches(source, batch_size=BATCH, seed=0, flip=True, place=put) as data:
        next(data)
        began = time.perf_counter()
        for _ in range(count):
            batch = next(data)
        jax.block_until_ready(batch)
        return count * BATCH / (time.perf_counter() - began)


def loop(updates: Updates, source: Source, put, size: int) -> Tuple[float, float]:
    """(seconds, seconds of waiting for a batch) per step of a loop that reads as it trains, at most two steps in flight.

    A network that is not for such pictures reads them as well, and trains on its own.
    """
    own, window, waited = updates.batch, [], 0.0
    with batches(source, batch_size=size, seed=0, flip=True, place=put) as data:
        next(data)
        began = time.perf_counter()
        while len(window) < STEPS and time.perf_counter() - began < SECONDS:
            since = time.perf_counter()
            batch = next(data)
            waited += time.perf_counter() - since
            window.append(updates({key: batch[key] if key in batch and batch[key].shape == a.shape else a for key, a in own.items()}))
            jax.block_until_ready(window[-min(3, len(window))])
        jax.block_until_ready(window[-1])
        return (time.perf_counter() - began) / len(window), waited / len(window)


def wire(source: Source) -> float:
    """Bytes of one example as it goes to the devices."""
    return float(sum(a.nbytes for a in source.read([0]).values()))
