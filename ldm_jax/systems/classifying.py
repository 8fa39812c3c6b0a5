"""Training of a classifier of noisy images, for classifier guidance (Dhariwal & Nichol 2021, section 4).

    L = -log p(y | x_t),   x_t = alpha_t x0 + sigma_t eps,   t and eps drawn as in the training of diffusion
"""
from typing import Any, Callable, Tuple, Union

import jax
import jax.numpy as jnp

from ldm_jax import process
from ldm_jax.systems.base import System
from ldm_jax.types import UserError, example_keys, expand, fold_in, normal, to_signed


def classifying(net: Any, *, image_shape: Tuple[int, int, int], schedule: process.Schedule, num_classes: int,
                times: Union[str, Callable] = "uniform") -> System:
    """Training of log p(y | x_t) by one net, named "classifier"; its `classify` is what guidance wants the log-softmax of.

    The metrics are "accuracy", and "accuracy_early" over the examples of a batch with t < 1/2, 0 where there are none.

    Args:
      net: a classifier, apply(params, x_t, t, train, rngs) -> logits [B, num_classes].
      times: a row of TIMES, or a function.

    Raises:
      UserError: when the net has another number of classes.
    """
    if net.num_classes != num_classes:
        raise UserError(f"the classifier has {net.num_classes} classes and the data has num_classes={num_classes}; "
                        f"make them equal")

    def loss_fn(params, batch, key):
        x0 = to_signed(batch["image"])
        keys = example_keys(key, x0.shape[0])
        k_times, k_noise, k_net = (fold_in(keys, i) for i in range(3))
        t, correction = process.times.draw_times(times, k_times, x0.shape[0], schedule)
        x_t = expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * normal(k_noise, x0.shape)
        logits = net.apply(params["classifier"], x_t, t, True, {"dropout": k_net[0]})
        label = batch["class"][:, None]
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), label, -1)[:, 0]
        right, early = (jnp.argmax(logits, -1, keepdims=True) == label)[:, 0].astype(jnp.float32), t < 0.5
        return correction * loss, {"accuracy": right, "accuracy_early": jnp.sum(right * early) / jnp.maximum(jnp.sum(early), 1), "t": t}

    return System(nets={"classifier": net}, trained=("classifier",), loss_fn=loss_fn, image_shape=tuple(image_shape),
                  num_classes=num_classes, init=lambda key: {"classifier": net.init(key)},
                  classify=lambda params, x_t, t: net.apply(params["classifier"], x_t, t))
