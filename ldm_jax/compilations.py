"""What JAX compiles, counted and timed."""
import contextlib
import dataclasses
import time
from typing import Iterable, Iterator, List, Tuple

from jax import monitoring

_STAGES = "/jax/core/compile/"  # tracing, lowering and compiling, one event each, inner traces as well
_COMPILED, _HIT = _STAGES + "backend_compile_duration", "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass
class Compilations:
    """What was compiled while it was watched.

    Attributes:
      programs: their names, such as "jit(f)", in order; those that were found in the persistent cache as well. hits: how many were.
      spans: (kind of work, begin, end) by time.perf_counter; they may overlap.
    """
    programs: List[str] = dataclasses.field(default_factory=list)
    spans: List[Tuple[str, float, float]] = dataclasses.field(default_factory=list)
    hits: int = 0

    def count(self, name: str) -> int:
        """How often the function `name` was compiled."""
        return sum(program in (name, f"jit({name})", f"jit_{name}") for program in self.programs)

    @property
    def seconds(self) -> float:
        """Of tracing, lowering and compiling together."""
        return _covered((begin, end) for _, begin, end in self.spans)

    @property
    def compiling(self) -> float:
        """Of the seconds those of the compiler, or of reading what it has compiled before."""
        return _covered((begin, end) for kind, begin, end in self.spans if kind == _COMPILED)


def _covered(spans: Iterable[Tuple[float, float]]) -> float:
    """The length of the spans, what overlaps counted once."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total, until = total + max(0.0, end - max(begin, until)), max(until, end)
    return total


@contextlib.contextmanager
def watching() -> Iterator[Compilations]:
    """Whatever this process compiles inside the block."""
    seen = Compilations()

    def on_duration(event: str, seconds: float, **facts) -> None:
        if event.startswith(_STAGES):
            end = time.perf_counter()
            seen.spans.append((event, end - seconds, end))
            if event == _COMPILED:
                seen.programs.append(str(facts.get("fun_name", "")))

    def on_event(event: str, **_) -> None:
        seen.hits += event == _HIT

    monitoring.register_event_duration_secs_listener(on_duration)
    monitoring.register_event_listener(on_event)
    try:
        yield seen
    finally:
        monitoring.unregister_event_duration_listener(on_duration)
        monitoring.unregister_event_listener(on_event)
