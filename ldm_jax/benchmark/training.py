"""--suite=train: the update of the training loop, compiled as it compiles it, on a batch that is on the device already."""
import dataclasses
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ldm_jax.benchmark import nets, timing
from ldm_jax.benchmark.report import Row
from ldm_jax.benchmark.settings import Settings
from ldm_jax.parallel import cost
from ldm_jax.parallel.sharding import make_mesh, placer, replicated
from ldm_jax.parallel.signals import asking
from ldm_jax.training.loop import compiled_step, train_step
from ldm_jax.training.state import TrainState, learning_rate, new_state, optimizer


@dataclasses.dataclass
class Updates:
    """The updates of a training loop, one at each call: with `batch`, or with one of its own.

    Attributes:
      step: as `train_step` made it. compiled: the same, by `compiled_step`.
      state: after the last update. batch: on the devices. rest: the further arguments of `compiled`.
      mesh: where they are.
    """
    step: Callable
    compiled: Any
    state: TrainState
    batch: Dict[str, jax.Array]
    rest: Tuple[jax.Array, ...]
    mesh: Mesh

    def __call__(self, batch: Optional[Mapping[str, jax.Array]] = None) -> Dict[str, jax.Array]:
        """The metrics, which may not be computed yet."""
        self.state, metrics = self.compiled(self.state, batch or self.batch, *self.rest)
        return metrics

    def wait(self) -> None:
        """One update, to its end."""
        jax.block_until_ready(self())


def unasked(case: nets.Case, settings: Settings) -> bool:
    """Whether this machine should not train the network unless its name was given."""
    return settings.cpu and not case.train_on_cpu and settings.asked is None


def size_of(case: nets.Case, settings: Settings) -> int:
    """How many pictures an update takes."""
    return settings.batch or (case.batch if settings.cpu else case.accelerator)[0]


def updates_of(case: nets.Case, settings: Settings) -> Updates:
    """Those of the network with AdamW and one average, from a state of its own."""
    size = size_of(case, settings)
    system = nets.system_of(case, settings.dtype, **case.options)
    mesh = make_mesh()
    put = placer(mesh)
    batch = {key: put(a, 0, size) for key, a in nets.batch_of(case, size).items()}
    tx = optimizer("adamw", learning_rate(1e-4, steps=1))
    state = jax.jit(lambda key: new_state(system.init(key), system.trained, tx), out_shardings=replicated(mesh))(jax.random.key(0))
    key, good = (jax.device_put(a, replicated(mesh)) for a in (jax.random.key(0), jnp.bool_(True)))
    rest = key, good, asking(mesh)(0)
    step = train_step(system.loss_fn, tx, ema_decay=0.9999)
    return Updates(step, compiled_step(step, state, batch, *rest), state, batch, rest, mesh)


def run(name: str, case: nets.Case, settings: Settings) -> List[Row]:
    if unasked(case, settings):
        return []
    size, updates = size_of(case, settings), updates_of(case, settings)
    operations = cost.flops(updates.step, updates.state, updates.batch, *updates.rest[:2])
    memory, counted = cost.memory(updates.compiled), _counted(updates.compiled)
    calls = {"ldm_jax": updates.wait}
    if settings.peer:
        calls.update(settings.peer.training(name, size, settings.peer_labels))
    times = timing.alternate(calls, settings.rounds, warm=2)
    ours_s, low, high = timing.spread(times["ldm_jax"])
    best, ratio = fastest(times)
    peak = settings.ceiling()
    detail = {"batch": size, "dtype": settings.dtype, "step_ms": 1e3 * ours_s, "gflop_per_image": operations / size / 1e9,
              "compiled_gflop_per_image": None if counted is None else counted / size / 1e9, "seconds": times,
              "of_ceiling": operations / ours_s / peak, "ceiling_tflops": peak / 1e12}
    rows = [Row("train", name, f"update, batch {size}", size / ours_s, "images/s", size / high, size / low,
                best and (best, size / timing.spread(times[best])[0]), ratio, detail),
            Row("train", name, "of what matrix products reach", 100 * operations / ours_s / peak, "%"),
            Row("train", name, "memory, by the compiler", memory.total / 2**30, "GiB", detail={"temporary": memory.temporary})]
    used = settings.memory_in_use()
    return rows + ([Row("train", name, "memory, measured", used / 2**30, "GiB")] if used else [])


def fastest(times) -> Tuple[Optional[str], Optional[Tuple[float, float, float]]]:
    """(the peer that took the least time, our ratio to it); (None, None) without peers."""
    peers = [name for name in times if name != "ldm_jax"]
    best = min(peers, key=lambda name: timing.spread(times[name])[0], default=None)
    return best, best and timing.ratios(times["ldm_jax"], times[best])


def _counted(compiled) -> Optional[float]:
    """The compiler's own count of operations, where it gives one."""
    try:
        return (compiled.cost_analysis() or {}).get("flops")
    except (RuntimeError, NotImplementedError):
        return None
