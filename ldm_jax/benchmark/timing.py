"""Times of calls that take turns, so that what slows the machine down slows all of them."""
import statistics
import time
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes; it must return when its work is done."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def alternate(calls: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1) -> Dict[str, List[float]]:
    """name -> seconds of each round, after `warm` rounds that are not counted. Every round runs each call once."""
    times = {name: [] for name in calls}
    for i in range(warm + rounds):
        for name, call in calls.items():
            taken = seconds(call)
            if i >= warm:
                times[name].append(taken)
    return times


def spread(values: Sequence[float]) -> Tuple[float, float, float]:
    """(median, smallest, largest)."""
    return statistics.median(values), min(values), max(values)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Tuple[float, float, float]:
    """(median, smallest, largest) of theirs / ours, pair by pair: above 1 we are the faster."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])
