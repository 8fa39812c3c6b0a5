"""What a training run carries from step to step, and the optimisers and learning-rate schedules it can be given."""
import dataclasses
from typing import Any, Mapping, Optional, Sequence

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from ldm_jax.training.averages import new_powers
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
      others: what no gradient changes: nets held fixed (a first stage), the latents' scale, and what a system refreshes by itself.
      powers: relative length -> power-function average of the parameters, float32, see `training.averages`; {} without.
    """
    step: Array
    params: PyTree
    ema: PyTree
    opt_state: Any
    others: PyTree
    powers: PyTree = dataclasses.field(default_factory=dict)


def new_state(params: Mapping[str, PyTree], trained: Sequence[str], tx: optax.GradientTransformation,
              stds: Sequence[float] = ()) -> TrainState:
    """The state at step 0 from all of a system's parameters, of which those named in `trained` are trained.

    stds: the relative lengths of the power-function averages that it carries.
    """
    mine = {name: params[name] for name in trained}
    others = {name: tree for name, tree in params.items() if name not in trained}
    return TrainState(step=jnp.int32(0), params=mine, ema=jax.tree.map(jnp.copy, mine), opt_state=tx.init(mine), others=others,
                      powers=new_powers(mine, stds))


def muon(learning_rate: optax.Schedule, *, adam_ratio: float = 0.05, **options) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for kernels, each a matrix from its inputs to its outputs, and Adam with Nesterov's momentum, at
    `adam_ratio` times the rate, for everything else. The kernels of scanned blocks are one matrix per block."""
    def dimensions(params: PyTree) -> PyTree:
        def of(path, p):
            if path[-1].key != "kernel" or p.ndim < 2:
                return None
            inputs = (1,) if p.ndim == 3 else tuple(range(p.ndim - 1))
            return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=p.ndim - 1)

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.muon(learning_rate, adam_learning_rate=lambda step: adam_ratio * learning_rate(step),
                              muon_weight_dimension_numbers=dimensions, **options)


OPTIMIZERS = {"adam": optax.adam, "adamw": optax.adamw, "lion": optax.lion, "muon": muon, "sgd": optax.sgd}

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


def by_name(tx: optax.GradientTransformation, special: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """`tx` for all trained parameters but those of the nets that `special` has an optimiser for; each clips its own gradient."""
    def labels(params):
        return {name: name if name in special else "" for name in params}

    return optax.partition({"": tx, **special}, labels) if special else tx
