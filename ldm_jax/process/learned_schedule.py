"""A noise schedule that is trained with the network: logsnr(t) = -gamma(t) with gamma monotone (Kingma et al. 2021).

    g(t) = l1 t + b1 + w3 . sigmoid(w2 (l1 t + b1) + b2)                         all of l1, w2, w3 positive
    gamma(t) = gamma_min + (gamma_max - gamma_min) (g(t) - g(0)) / (g(1) - g(0))

so the two ends are parameters of their own. The diffusion term of the bound in the limit of many steps depends on the ends alone.
"""
from typing import Optional

import jax
import jax.numpy as jnp

from ldm_jax.process.noising import Schedule, from_logsnr, is_traced
from ldm_jax.types import Array, PyTree, UserError

BISECTIONS = 26  # halves [0, 1] below float32's spacing near 1


def init_learned(key: Array, features: int = 1024, gamma_min: float = -13.3, gamma_max: float = 5.0) -> PyTree:
    """Parameters of `learned`: gamma nearly linear at first, from `gamma_min` to `gamma_max`, VDM's ends.

    Raises:
      UserError: unless gamma_min < gamma_max and there is at least one feature.
    """
    if not (gamma_min < gamma_max and features >= 1):
        raise UserError(f"a learned schedule needs gamma_min < gamma_max and features >= 1; "
                        f"got {gamma_min!r}, {gamma_max!r}, {features!r}")
    w2 = jax.random.normal(key, (features,), jnp.float32)
    return {"gamma_min": jnp.float32(gamma_min), "gamma_max": jnp.float32(gamma_max), "l1": jnp.float32(gamma_max - gamma_min),
            "b1": jnp.float32(gamma_min), "w2": w2, "b2": jnp.zeros(features, jnp.float32),
            "w3": jnp.full(features, 1e-2, jnp.float32)}


def gamma(params: PyTree, t: Array) -> Array:
    """gamma(t) = -logsnr(t), increasing; t a scalar or an array of any shape. l1, w2 and w3 enter by their absolute values."""
    def g(t):
        h = jnp.abs(params["l1"]) * t + params["b1"]
        inner = jax.nn.sigmoid(jnp.tensordot(h, jnp.abs(params["w2"]), 0) + params["b2"].reshape((1,) * h.ndim + (-1,)))
        return h + jnp.tensordot(inner, jnp.abs(params["w3"]), 1) / params["w3"].size

    g_0, g_1 = g(jnp.float32(0.0)), g(jnp.float32(1.0))
    part = (g(jnp.asarray(t, jnp.float32)) - g_0) / (g_1 - g_0)
    return params["gamma_min"] + (params["gamma_max"] - params["gamma_min"]) * part


def learned(params: Optional[PyTree] = None) -> Schedule:
    """The variance-preserving schedule of `gamma`; params from `init_learned`, traced inside a loss. None: the untrained one.

    It keeps a little noise at t = 0, sigma(0)^2 = sigmoid(gamma_min), which the decoder of the bound answers for. The inverse is
    found by bisection and carries no gradient.
    """
    if params is None:
        params = init_learned(jax.random.key(0))
    if not is_traced(params["gamma_min"], params["gamma_max"]) and not params["gamma_min"] < params["gamma_max"]:
        raise UserError(f"a learned schedule needs gamma_min < gamma_max; got {params['gamma_min']} and {params['gamma_max']}")

    def t_of_logsnr(l):
        def halve(_, bounds):
            low, high = bounds
            middle = 0.5 * (low + high)
            below = gamma(params, middle) < -l
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(l), jnp.ones_like(l)))
        return jax.lax.stop_gradient(0.5 * (low + high))

    return from_logsnr("learned", lambda t: -gamma(params, t), t_of_logsnr, vanishing=False)
