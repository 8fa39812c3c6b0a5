"""What a training run carries from step to step, and the optimisers and learning-rate schedules it can be given."""
import dataclasses
from typing import Any, Mapping, Optional, Sequence

import jax
import jax.numpy as jnp
import optax

from ldm_jax.types import Array, PyTree, UserError, lookup


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint must hold for a run to go on as if it had never stopped.

    Attributes:
      step: int32 scalar, the number of updates done.
      params: the trained parameters, one entry per trained net.
      ema: their exponential moving average, what samples are drawn from.
      opt_state: the optimiser's state.
      fixed: parameters that are used but not trained here (a first stage, its latents' scale).
    """
    step: Array
    params: PyTree
    ema: PyTree
    opt_state: Any
    fixed: PyTree


def new_state(params: Mapping[str, PyTree], trained: Sequence[str], tx: optax.GradientTransformation) -> TrainState:
    """The state at step 0 from all of a system's parameters, of which those named in `trained` are trained."""
    mine = {name: params[name] for name in trained}
    fixed = {name: tree for name, tree in params.items() if name not in trained}
    return TrainState(step=jnp.int32(0), params=mine, ema=jax.tree.map(jnp.copy, mine), opt_state=tx.init(mine), fixed=fixed)


OPTIMIZERS = {"adam": optax.adam, "adamw": optax.adamw, "lion": optax.lion, "sgd": optax.sgd}

DECAYS = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
}


def learning_rate(peak: float, *, steps: int, warmup_steps: int = 0, decay: str = "constant") -> optax.Schedule:
    """Linear warm-up from 0 to `peak` over `warmup_steps`, then `decay` (a row of DECAYS) over the rest of `steps`.

    Raises:
      UserError: for an unknown decay, or a warm-up that does not fit in the run.
    """
    if not 0 <= warmup_steps < max(steps, 1):
        raise UserError(f"warmup_steps={warmup_steps} does not fit in a run of {steps} steps; give 0 <= warmup_steps < steps")
    after = lookup(DECAYS, decay, "learning-rate decay")(peak, steps - warmup_steps)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]) if warmup_steps else after


def optimizer(name: str, learning_rate: optax.Schedule, *, clip_norm: Optional[float] = None,
              **options) -> optax.GradientTransformation:
    """A row of OPTIMIZERS with its options, after clipping the gradient to a global norm of `clip_norm`."""
    tx = lookup(OPTIMIZERS, name, "optimizer")(learning_rate, **options)
    return optax.chain(optax.clip_by_global_norm(clip_norm), tx) if clip_norm else tx
