"""What a system is, and the plainest one: diffusion in whatever space a codec gives, under any conditions or none.

A system wires nets and process into the functions that the trainer and the user call. It has no loop and no maths of its own.
"""
import dataclasses
from typing import Any, Callable, Mapping, Optional, Tuple

import jax
import jax.numpy as jnp

from ldm_jax import process
from ldm_jax.systems import conditions
from ldm_jax.systems.conditions import Conditioner
from ldm_jax.types import Array, Cond, Denoise, PyTree, example_keys, fold_in, to_signed


@dataclasses.dataclass(frozen=True)
class System:
    """A trainable, usable whole. Its parameters are a dict with one entry per name in `init`'s result.

    Attributes:
      nets: name -> network, by the name of its parameters.
      trained: the names whose parameters training changes; the others are held fixed.
      init: key -> parameters.
      loss_fn: (params, batch, key) -> (per-example loss [B], metrics); where metrics has the examples' "t" [B], the trainer also logs
        their "mse", or loss, by noise level.
      image_shape: (H, W, C) of the pictures.
      conditioners: name -> what it can be asked for; {} for an unconditional system.
      num_classes: the classes that it can be asked for, None where there are none.
      sample: (params, x, keys, cond, options) -> pictures [B, H, W, C] in [-1, 1], see `diffusion`; None where it makes none.
      sample_shape: one example's starting noise.
      reconstruct: (params, images [-1, 1]) -> images, where the system is a first stage.
      classify: (params, x_t, t) -> logits [B, num_classes] of p(y | x_t), where the system is a classifier of noisy images.
      codes: (params, images) -> the codes [B, h, w] that it keeps, where it has a codebook.
      refresh: (params, notes) -> the entries of params that change without a gradient after a step (a counter, a codebook's dead
        entries), notes being what loss_fn left in metrics["notes"].
      read: () -> the entries of params that come from files, read once when a run begins.
      schedule, parameterization, learned_variance: of the process, where there is one.
      adapter_scale: what the adapters in params["lora"] are multiplied by, see `systems.adapting`; None where there are none.
      kept: (values, bits) that a first stage keeps of a picture: how many, and of how many bits each.
    """
    nets: Mapping[str, Any]
    trained: Tuple[str, ...]
    init: Callable[[Array], Mapping[str, PyTree]]
    loss_fn: Callable
    image_shape: Tuple[int, int, int]
    conditioners: Mapping[str, Conditioner] = dataclasses.field(default_factory=dict)
    num_classes: Optional[int] = None
    sample: Optional[Callable] = None
    sample_shape: Optional[Tuple[int, ...]] = None
    reconstruct: Optional[Callable] = None
    classify: Optional[Callable] = None
    refresh: Optional[Callable] = None
    read: Optional[Callable] = None
    kept: Optional[Tuple[int, float]] = None
    codes: Optional[Callable] = None
    schedule: Optional[process.Schedule] = None
    parameterization: Optional[str] = None
    learned_variance: bool = False
    adapter_scale: Any = None


@dataclasses.dataclass(frozen=True)
class Codec:
    """Pictures to the space that is diffused and back: encode(params, batch, key) -> x0, decode(params, x0) -> image."""
    encode: Callable[[PyTree, Mapping[str, Array], Array], Array] = lambda params, batch, key: to_signed(batch["image"])
    decode: Callable[[PyTree, Array], Array] = lambda params, x0: x0


# folded into a sampling key for the noise of the conditions and of the pictures' latents; a step's own is folded with its index
_CONDITION, _PICTURE = 2**31 - 1, 2**31 - 2


_TABLE = 2**28  # bytes that what depends on the time may take, for several steps; where it takes more it is no part worth saving


def _if_small(table: Callable[[], PyTree]) -> PyTree:
    """table(), or {} where its arrays would take more than _TABLE."""
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(table)))
    return table() if size <= _TABLE else {}


def diffusion(net, *, image_shape: Tuple[int, int, int], schedule: process.Schedule, parameterization: str, times: Any = "uniform",
              weight: Any = "simple", conditioners: Mapping[str, Conditioner] = {}, learned_variance: bool = False,
              codec: Codec = Codec(), sample_shape: Optional[Tuple[int, ...]] = None, others: Mapping[str, Any] = {}) -> System:
    """Diffusion of x0 = codec.encode(batch) by one net, named "net". With parameterization "edm" the net is preconditioned.

    Args:
      net: the denoising network, built with `conditioners.needs(conditioners)`.
      times, weight: rows of TIMES and WEIGHTS, or functions.
      conditioners: name -> conditioner; they reach the net in the order of their names.
      learned_variance: the net has twice the channels, and learns the variance by the hybrid loss.
      sample_shape: the shape of one x0; the image's without a codec.
      others: nets that the codec uses, name -> net; their parameters are held fixed.

    Raises:
      UserError: for a parameterization that the schedule rules out, or a net that was built for other conditions.
    """
    process.parameterizations.check_parameterization(parameterization, schedule)
    conditioners = dict(sorted(conditioners.items()))
    conditions.check_net(net, conditioners)

    def init(key):
        return {name: n.init(fold_in(key, i)) for i, (name, n) in enumerate({"net": net, **others}.items())}

    def loss_fn(params, batch, key):
        keys = example_keys(key, len(jax.tree.leaves(batch)[0]))
        k_code, k_cond, k_process, k_net = (fold_in(keys, i) for i in range(4))
        cond = conditions.of_batch(conditioners, params, batch, k_cond, codec)
        x0 = codec.encode(params, batch, k_code)

        predict = prediction(lambda x_t, t: net.apply(params["net"], x_t, t, cond, True, {"dropout": k_net[0]}))
        loss, metrics = process.diffusion_loss(predict, schedule, parameterization, x0, k_process, times=times, weight=weight,
                                               learned_variance=learned_variance)
        return loss, {name: metrics[name] for name in ("mse", "vlb", "t") if name in metrics}

    def prediction(apply):
        return process.parameterizations.preconditioned(apply, schedule) if parameterization == "edm" else apply

    def denoisers(params, cond: Cond, x: Array):
        """times -> the denoiser of batches like x; what depends on the condition alone is computed here, and on `times` there.

        times: all that the denoiser will be asked for, [N], or None where that is not known.
        """
        prepares = hasattr(net, "of_condition")  # all that a net must have is init and apply
        kept = net.of_condition(params["net"], x, cond) if prepares else {}

        def at(times: Optional[Array]) -> Denoise:
            table = {} if times is None or not prepares else _if_small(lambda: net.of_times(params["net"], x, times, cond))

            def raw(x_t, t):
                row = jax.tree.map(lambda a: a[jnp.argmin(jnp.abs(times - t[0]))], table)
                return net.apply(params["net"], x_t, t, cond, **({"kept": {**kept, **row}} if prepares else {}))

            return process.denoiser(prediction(raw), schedule, parameterization, learned_variance=learned_variance)

        return at

    def sample(params, x: Array, keys: Array, cond: Optional[Mapping[str, PyTree]], *, sampler: process.Sampler, steps,
               capacity: int, grid="uniform", guidance=None, log_prob=None, log_prob_scale=1.0, trajectory: bool = False,
               start=None, image=None, strength=1.0, known=None, window=None, begun: bool = False, decoded: bool = True,
               guidance_interval=None):
        """Pictures from the starting noise x [B, ...] and keys [B].

        cond: conditioner's name -> value; those left out are null. guidance: None for a program without it, or a number or [B]; where it
          is 1 for all pictures only the conditional half is computed. guidance_interval: (low, high) of sigma / alpha, outside which
          it is 1.
        log_prob: (x_t, t) -> log p(y | x_t) [B] of a classifier, whose gradient takes part with log_prob_scale, a number or [B].
        start: what the noise is multiplied by; sigma(1) where None.
        image: pictures [B, H, W, C] in [-1, 1] to start from, noised by x to where the last `strength` of the steps begin.
        known: (pictures, mask [B, H, W, 1]): what is kept where the mask is 1. window: see `process.editing.between`.
        begun: x is x_t at the window's begin. decoded: return pictures, otherwise x_t.
        """
        given, without = conditions.of_values(conditioners, params, cond or {}, fold_in(keys, _CONDITION), codec)
        times = process.samplers.grid_times(grid, schedule, steps, capacity)
        if window is not None:
            times, steps = process.editing.between(times, steps, window)
        if image is not None:
            times, steps = process.editing.last_steps(times, steps, strength)
        times = jnp.clip(times, 0.0, 1.0)
        guided = guidance is not None and any(c.drop for c in conditioners.values())
        single = denoisers(params, given, x)
        if guided:
            pair = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), given, without)
            double = denoisers(params, pair, jnp.concatenate([x, x]))
            scale = guidance if guidance_interval is None else process.guidance.within(schedule, guidance, *guidance_interval)

        def predictor(near: Optional[Array] = None):
            """The denoiser that the sampler asks, at the times `near` only where they are given."""
            predict = single(near)
            if guided:
                alone, both = predict, double(near)

                def together(x_t, t):
                    answer = both(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]))
                    return tuple(jax.tree.map(lambda a: a[half * len(x_t):][:len(x_t)], answer) for half in (0, 1))

                def halves(x_t, t):
                    off = jnp.all((scale(t) if callable(scale) else scale) == 1)
                    return jax.lax.cond(off, lambda x_t, t: (alone(x_t, t),) * 2, together, x_t, t)

                predict = process.GUIDANCE["classifier_free"](*process.guidance.halves(halves), scale)
            if log_prob is not None:
                predict = process.GUIDANCE["classifier"](predict, log_prob, log_prob_scale, schedule)
            return predict

        def latents(pictures):
            return codec.encode(params, {"image": pictures}, fold_in(keys, _PICTURE))

        if image is not None:
            x = schedule.alpha(times[0]) * latents(image) + schedule.sigma(times[0]) * x
        elif not begun:
            x = (schedule.sigma(jnp.float32(1.0)) if start is None else start) * x
        ahead = predictor if sampler.on_grid and parameterization != "edm" else None
        if known is not None:
            pictures, mask = known
            rows, columns = (n // m for n, m in zip(mask.shape[1:3], x.shape[1:3]))
            sampler = process.editing.keeping(sampler, latents(pictures), mask[:, ::rows, ::columns])
        out = process.sample(predictor(), schedule, x, keys, ahead=ahead, sampler=sampler, steps=steps, grid=times, capacity=capacity,
                             trajectory=trajectory)
        end, visited = out if trajectory else (out, None)
        end = codec.decode(params, end) if decoded else end
        return (end, jax.lax.map(lambda x_t: codec.decode(params, x_t), visited["x"])) if trajectory else end

    return System(nets={"net": net, **others}, trained=("net",), init=init, loss_fn=loss_fn, image_shape=image_shape,
                  conditioners=conditioners, num_classes=conditions.needs(conditioners).get("num_classes"), sample=sample,
                  sample_shape=tuple(sample_shape or image_shape), schedule=schedule, parameterization=parameterization,
                  learned_variance=learned_variance)
