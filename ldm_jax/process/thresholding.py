"""Keeping the denoiser's x0 within the range of data (Saharia et al. 2022, section 2.3): denoise -> denoise."""
import jax
import jax.numpy as jnp

from ldm_jax.types import Denoise, expand, join_prediction, split_prediction


def static_clip(denoise: Denoise, bound=1.0) -> Denoise:
    """x0 clipped to [-bound, bound]; a number or [B], traced."""
    def clipped(x_t, t):
        x0, frac = split_prediction(denoise(x_t, t))
        limit = expand(bound, x0)
        return join_prediction(jnp.clip(x0, -limit, limit), frac)

    return clipped


def dynamic_threshold(denoise: Denoise, quantile=0.995, bound=1.0, maximum=jnp.inf) -> Denoise:
    """x0 clipped to [-m, m] and times bound / m, m the `quantile` of |x0| in each example, at least `bound`, at most `maximum`.

    The three are numbers or [B], traced. Saturated values move inwards instead of piling up at the bound.
    """
    def clipped(x_t, t):
        x0, frac = split_prediction(denoise(x_t, t))
        size = jnp.abs(x0).reshape(x0.shape[0], -1)
        m = jax.vmap(jnp.quantile)(size, jnp.broadcast_to(quantile, size.shape[:1]))
        m = expand(jnp.clip(m, bound, jnp.maximum(maximum, bound)), x0)
        return join_prediction(jnp.clip(x0, -m, m) * (expand(bound, x0) / m), frac)

    return clipped
