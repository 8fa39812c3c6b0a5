"""--suite=checkpoint: what saving costs the training loop, of the network's whole state into a temporary directory.

A save holds the loop up until the arrays are copied; then updates go on beside its writing, which may slow them down.
"""
import concurrent.futures
import tempfile
import time
from typing import List, Tuple

import jax

from ldm_jax.benchmark import nets, timing
from ldm_jax.benchmark.report import Row
from ldm_jax.benchmark.settings import Settings
from ldm_jax.benchmark.training import Updates, size_of, unasked, updates_of
from ldm_jax.training.checkpoint import Checkpoints

EVERY = 1000  # steps between saves, the training loop's default


def run(name: str, case: nets.Case, settings: Settings) -> List[Row]:
    if unasked(case, settings):
        return []
    size = size_of(case, settings)
    with tempfile.TemporaryDirectory(prefix="ldm_jax-") as directory, Checkpoints(directory) as checkpoints:
        updates = updates_of(case, settings)
        checkpoints.restore(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), updates.state),
                            warn=print)  # as the loop begins
        step = timing.spread(timing.alternate({"": updates.wait}, settings.rounds, warm=2)[""])[0]
        saves = [saved(checkpoints, i, updates, step) for i in range(1 + settings.rounds)]
    megabytes = sum(a.nbytes for a in jax.tree.leaves(updates.state)) / 1e6
    facts = {"megabytes": megabytes, "arrays": len(jax.tree.leaves(updates.state)), "batch": size, "dtype": settings.dtype,
             "step_ms": 1e3 * step}
    (first, *stalls), (_, *slowed), (_, *writing) = zip(*saves)
    rows = [Row("checkpoint", name, "stalled by a run's first save", 1e3 * first, "ms", detail=facts)]
    for what, seconds in (("stalled by a save", stalls), ("updates slowed down by its writing", slowed), ("written", writing)):
        median, low, high = (1e3 * s for s in timing.spread(seconds))
        rows.append(Row("checkpoint", name, f"{what}, {megabytes:,.0f} MB", median, "ms", low, high, detail=facts))
    shares = [100 * (a + b) / (EVERY * step) for a, b in zip(stalls, slowed)]
    median, low, high = timing.spread(shares)
    return [*rows, Row("checkpoint", name, f"of the time of {EVERY:,} updates, both", median, "%", low, high)]


def saved(checkpoints: Checkpoints, number: int, updates: Updates, step: float) -> Tuple[float, float, float]:
    """Seconds for which a save held the loop up, by which updates were longer than `step` until it was written, and until it was."""
    began = time.perf_counter()
    checkpoints.save(number, updates.state, {"next_index": number})
    stalled, slower = time.perf_counter() - began, 0.0
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        written = executor.submit(checkpoints.wait)
        while not written.done():
            slower += timing.seconds(updates.wait) - step
        written.result()
    return stalled, slower, time.perf_counter() - began - stalled
