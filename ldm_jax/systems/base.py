"""What a system is, and the plainest one: class-conditional or unconditional diffusion in whatever space a codec gives.

A system wires nets and process into the functions that the trainer and the user call. It has no loop and no maths of its own.
"""
import dataclasses
from typing import Any, Callable, Mapping, Optional, Tuple

import jax
import jax.numpy as jnp

from ldm_jax import process
from ldm_jax.types import Array, Cond, PyTree, example_keys, expand, fold_in, to_signed, uniform


@dataclasses.dataclass(frozen=True)
class System:
    """A trainable, usable whole. Its parameters are a dict with one entry per name in `init`'s result.

    Attributes:
      nets: name -> network, by the name of its parameters.
      trained: the names whose parameters training changes; the others are held fixed.
      init: key -> parameters.
      loss_fn: (params, batch, key) -> (per-example loss [B], metrics).
      image_shape: (H, W, C) of the pictures.
      num_classes: the classes that it can be asked for; None for an unconditional system.
      sample: (params, x, keys, cond, options) -> pictures [B, H, W, C] in [-1, 1], see `diffusion`; None where it makes none.
      sample_shape: one example's starting noise.
      reconstruct: (params, images [-1, 1], key) -> images, where the system is a first stage.
    """
    nets: Mapping[str, Any]
    trained: Tuple[str, ...]
    init: Callable[[Array], Mapping[str, PyTree]]
    loss_fn: Callable
    image_shape: Tuple[int, int, int]
    num_classes: Optional[int] = None
    sample: Optional[Callable] = None
    sample_shape: Optional[Tuple[int, ...]] = None
    reconstruct: Optional[Callable] = None


@dataclasses.dataclass(frozen=True)
class Codec:
    """Pictures to the space that is diffused and back: encode(params, image, key) -> x0, decode(params, x0) -> image."""
    encode: Callable[[PyTree, Array, Array], Array] = lambda params, image, key: image
    decode: Callable[[PyTree, Array], Array] = lambda params, x0: x0


def drop_class(key: Array, labels: Array, rate: float, null: int) -> Array:
    """Labels, each replaced by the null class with probability `rate` (Ho & Salimans 2022, algorithm 1)."""
    return jnp.where(uniform(key, labels.shape[0]) <= rate, null, labels)


def diffusion(net, *, image_shape: Tuple[int, int, int], schedule: process.Schedule, parameterization: str, times: Any = "uniform",
              weight: Any = "simple", num_classes: Optional[int] = None, class_dropout: float = 0.1, learned_variance: bool = False,
              codec: Codec = Codec(), sample_shape: Optional[Tuple[int, ...]] = None, others: Mapping[str, Any] = {}) -> System:
    """Diffusion of x0 = codec.encode(image) by one net, named "net". With parameterization "edm" the net is preconditioned.

    Args:
      net: the denoising network; its null class, for dropped labels and for guidance, is `num_classes`.
      times, weight: rows of TIMES and WEIGHTS, or functions.
      class_dropout: how often a label is dropped in training, which is what classifier-free guidance needs.
      learned_variance: the net has twice the channels, and learns the variance by the hybrid loss.
      sample_shape: the shape of one x0; the image's without a codec.
      others: nets that the codec uses, name -> net; their parameters are held fixed.
    """
    process.parameterizations.check_parameterization(parameterization, schedule)

    def init(key):
        return {name: n.init(fold_in(key, i)) for i, (name, n) in enumerate({"net": net, **others}.items())}

    def loss_fn(params, batch, key):
        image = to_signed(batch["image"])
        keys = example_keys(key, image.shape[0])
        k_code, k_drop, k_process, k_net = (fold_in(keys, i) for i in range(4))
        cond = None if num_classes is None else {"class": drop_class(k_drop, batch["class"], class_dropout, num_classes)}
        x0 = codec.encode(params, image, k_code)

        predict = prediction(lambda x_t, t: net.apply(params["net"], x_t, t, cond, True, {"dropout": k_net[0]}))
        loss, metrics = process.diffusion_loss(predict, schedule, parameterization, x0, k_process, times=times, weight=weight,
                                               learned_variance=learned_variance)
        return loss, {name: metrics[name] for name in ("mse", "vlb") if name in metrics}

    def prediction(apply):
        return process.parameterizations.preconditioned(apply, schedule) if parameterization == "edm" else apply

    def denoise(params, cond: Cond):
        predict = prediction(lambda x_t, t: net.apply(params["net"], x_t, t, cond))
        return process.denoiser(predict, schedule, parameterization, learned_variance=learned_variance)

    def sample(params, x: Array, keys: Array, cond: Cond, *, sampler: process.Sampler, steps, capacity: int, grid="uniform",
               guidance=None, trajectory: bool = False):
        """Pictures from the starting noise x [B, ...]. guidance None: no guidance is computed; otherwise a number or [B]."""
        predict = denoise(params, cond)
        if guidance is not None and num_classes is not None:
            null = {"class": jnp.full_like(cond["class"], num_classes)}
            double = denoise(params, jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, null))

            def both(x_t, t):
                answer = double(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]))
                return tuple(jax.tree.map(lambda a: a[half * len(x_t):][:len(x_t)], answer) for half in (0, 1))

            predict = process.GUIDANCE["classifier_free"](*process.guidance.halves(both), guidance)
        x = expand(schedule.sigma(jnp.float32(1.0)), x) * x
        out = process.sample(predict, schedule, x, keys, sampler=sampler, steps=steps, grid=grid, capacity=capacity, trajectory=trajectory)
        if not trajectory:
            return codec.decode(params, out)
        end, visited = out
        return codec.decode(params, end), jax.lax.map(lambda x_t: codec.decode(params, x_t), visited["x"])

    return System(nets={"net": net, **others}, trained=("net",), init=init, loss_fn=loss_fn, image_shape=image_shape,
                  num_classes=num_classes, sample=sample, sample_shape=tuple(sample_shape or image_shape))
