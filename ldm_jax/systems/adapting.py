"""LoRA of a system (Hu et al. 2022): its nets are held fixed, and low-rank adapters of their kernels are trained instead."""
import dataclasses
from typing import Optional, Sequence

import jax
import jax.numpy as jnp

from ldm_jax.models import lora
from ldm_jax.models.lora import ATTENTION, Lora
from ldm_jax.systems.base import System
from ldm_jax.types import UserError, fold_in, lookup

_KEY = 2**31 - 2  # folded into the key of a system's parameters for the adapters' noise


def adapted(system: System, *, rank: int = 4, alpha: Optional[float] = None, targets: Sequence[str] = ATTENTION,
            nets: Sequence[str] = ("net",), start: Optional[Lora] = None) -> System:
    """The same system with W + (alpha / rank) A B for each targeted kernel W of `nets`; A and B, under "lora", are all it trains.

    The kernels are formed once in each call of loss_fn and of sample, outside its loop. sample takes lora_scale besides, a number
    that the adapters' part is multiplied by. At first A is noise and B zero: the system as it was.

    Args:
      alpha: by default `rank`.
      targets: regular expressions over the paths of kernels, see `ldm_jax.models.lora.init`.
      nets: the names of those that are adapted: "net", and text towers by theirs.
      start: adapters to go on from, with their own scale, in place of fresh ones; rank, alpha, targets and nets are then theirs.

    Raises:
      UserError: for names, ranks and targets that do not fit.
    """
    names = tuple(nets if start is None else start.adapters)
    for name in names:
        lookup(system.nets, name, "net to adapt")
    if not names:
        raise UserError(f"nets={nets!r} of LoRA names no net; choose from: {', '.join(sorted(system.nets))}")
    if "lora" in system.trained:
        raise UserError("this system has adapters already; adapt the one without")
    if rank < 1:
        raise UserError(f"rank={rank} of LoRA must be at least 1")
    scale = start.scale if start is not None else (rank if alpha is None else alpha) / rank

    def init(key):
        params = system.init(key)
        if start is not None:
            return {**params, "lora": jax.tree.map(lambda a: jnp.array(a, jnp.float32), dict(start.adapters))}
        key = fold_in(key, _KEY)
        shapes = [params[name] if name in params else jax.eval_shape(system.nets[name].init, key) for name in names]
        fresh = {name: lora.init(fold_in(key, i), shapes[i], targets, rank) for i, name in enumerate(names)}
        return {**params, "lora": fresh}

    def merged(params, strength=1.0):
        base = {name: tree for name, tree in params.items() if name != "lora"}
        return lora.merge_all(base, Lora(params["lora"], scale), strength)

    def loss_fn(params, batch, key):
        fixed = {name: tree if name == "lora" else jax.lax.stop_gradient(tree) for name, tree in params.items()}
        return system.loss_fn(merged(fixed), batch, key)

    def sample(params, x, keys, cond, *, lora_scale=1.0, **options):
        return system.sample(merged(params, lora_scale), x, keys, cond, **options)

    def of_merged(function):
        return function and (lambda params, *rest: function(merged(params), *rest))

    return dataclasses.replace(
        system, trained=("lora",), adapter_scale=scale, init=init, loss_fn=loss_fn, sample=system.sample and sample,
        reconstruct=of_merged(system.reconstruct), classify=of_merged(system.classify), codes=of_merged(system.codes))
