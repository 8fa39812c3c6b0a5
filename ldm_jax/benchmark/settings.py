"""What all suites are told, and what they ask of the machine."""
import dataclasses
import functools
import resource
from typing import Any, Optional, Tuple

import jax
import jax.numpy as jnp

from ldm_jax.benchmark import timing


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
      rounds: how often each call is timed. steps: of the sampler.
      batch: instead of the cases' own. asked: the names given by --net, None for those of the machine.
      peer: see `aside.Peer`, None without. peer_labels: which ways of it.
    """
    rounds: int = 5
    steps: int = 10
    batch: Optional[int] = None
    asked: Optional[Tuple[str, ...]] = None
    peer: Any = None
    peer_labels: Tuple[str, ...] = ()

    @property
    def cpu(self) -> bool:
        return jax.default_backend() == "cpu"

    @property
    def dtype(self) -> str:
        """What networks compute in: bfloat16 where there are matrix units for it."""
        return "float32" if self.cpu else "bfloat16"

    def ceiling(self) -> float:
        """FLOP/s that one large matrix product reaches on all devices together, in `dtype`."""
        return matrix_rate(self.dtype) * jax.device_count()

    def memory_in_use(self) -> Optional[float]:
        """The most bytes in use at once so far: on the device, on CPU by this process."""
        if self.cpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


@functools.lru_cache(maxsize=None)
def matrix_rate(dtype: str) -> float:
    """FLOP/s of a square matrix product on one device, the best of ten."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    product = jax.jit(jnp.dot)
    times = timing.alternate({"": lambda: product(a, a).block_until_ready()}, 10, warm=2)[""]
    return 2.0 * n**3 / min(times)
