"""Sampling by Langevin dynamics at a fixed time, alone or after the step of another method. See stepping.py.

    x <- x + delta sigma^2 score + sqrt(2 delta) sigma z = x - delta sigma eps(x, t) + sqrt(2 delta) sigma z            (7)

leaves p_t unchanged as delta -> 0. On a Gaussian p_t of variance v its own stationary variance is v / (1 - delta sigma^2 / (2
v)).
"""
import functools
from typing import Union

import jax
import jax.numpy as jnp

from ldm_jax.process.schedules import Schedule
from ldm_jax.process.singlestep import ddim, ddpm, euler, euler_maruyama
from ldm_jax.process.stepping import Sampler, check_option, estimate, scales, whole
from ldm_jax.types import Array, Denoise, expand, fold_in, normal

PREDICTORS = {"ddpm": ddpm, "ddpm_large": functools.partial(ddpm, variance="large"), "ddim": ddim, "euler": euler,
              "euler_maruyama": euler_maruyama}


def langevin(denoise: Denoise, schedule: Schedule, x: Array, t: Array, key: Array, delta, repeats, drawn: bool = False) -> Array:
    """`repeats` times equation (7) at time t [B]; both numbers may be traced, delta a scalar or [B]. sigma(t) > 0.

    drawn: delta is multiplied by |z|^2 / |eps|^2 of each example, which is 1 on average where eps is exact.
    """
    sigma, delta = expand(schedule.sigma(t), x), expand(delta, x)

    def once(i, x):
        _, eps = estimate(denoise, schedule, x, t)
        z = normal(fold_in(key, i), x.shape)
        size = delta * (_square(z) / _square(eps) if drawn else 1.0)
        return (x + sigma * (jnp.sqrt(2 * size) * z - size * eps)).astype(x.dtype)

    return jax.lax.fori_loop(0, whole(repeats), once, x)


def _square(x: Array) -> Array:
    """|x|^2 of each example, shaped to multiply x."""
    return jnp.sum(jnp.square(x), tuple(range(1, x.ndim)), keepdims=True)


def annealed_langevin(delta=0.1, repeats=10) -> Sampler:
    """`repeats` times equation (7) at each time of the grid, keeping x / alpha between them (Song & Ermon 2019, algorithm 1).

    Their step size alpha_i / 2 = epsilon sigma_i^2 / (2 sigma_L^2) is delta sigma_i^2. Out of alpha = 0 x is kept instead, and
    the step into sigma = 0 ends with the denoiser's x0. A grid with a constant ratio of noise levels suits it best.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        x = langevin(denoise, schedule, x, t, key, delta, repeats)
        (a_t, _), (a_s, s_s) = scales(schedule, t, x), scales(schedule, s, x)
        x0 = jax.lax.cond(jnp.any(s_s <= 0), lambda: estimate(denoise, schedule, x, t)[0].astype(x.dtype), lambda: x)
        kept = jnp.where(a_t > 0, a_s / jnp.where(a_t > 0, a_t, 1.0), 1.0) * x
        return jnp.where(s_s > 0, kept, a_s * x0), carry

    return Sampler(step, calls=repeats)


def predictor_corrector(predictor: Union[str, Sampler] = "ddpm", snr=0.16, repeats=1, first: str = "predictor",
                        norms: str = "expected") -> Sampler:
    """A step of `predictor`, then `repeats` times equation (7) at the time reached with delta = 2 snr^2.

    (Song et al. 2021, section 4.2.) It is the paper's delta sigma^2 = 2 (snr |z| / |score|)^2 with the norms replaced by what they
    concentrate at in many dimensions, sqrt(D) and sqrt(D) / sigma; so it depends neither on the batch nor on the draw. Nothing
    follows the step into sigma = 0.

    predictor: a row of PREDICTORS with its defaults, or a Sampler. On alpha = 1 "ddpm_large" is the paper's reverse diffusion.
    first: "predictor", or "corrector" for equation (7) at the time that the step leaves, before it.
    norms: "expected" as above, or "drawn" for those of each example's own z and score; the paper takes their means over a batch.
    """
    check_option("predictor_corrector", "first", first, ("predictor", "corrector"))
    check_option("predictor_corrector", "norms", norms, ("expected", "drawn"))
    if isinstance(predictor, str):
        check_option("predictor_corrector", "predictor", predictor, tuple(PREDICTORS))
        predictor = PREDICTORS[predictor]()

    def step(denoise, schedule, x, t, s, key, carry):
        def correct(x, at):
            return langevin(denoise, schedule, x, at, fold_in(key, 1), 2 * jnp.asarray(snr) ** 2, repeats, norms == "drawn")

        if first == "corrector":
            x = correct(x, t)
        x, carry = predictor.step(denoise, schedule, x, t, s, fold_in(key, 0), carry)
        if first == "corrector":
            return x, carry
        noisy = schedule.sigma(s) > 0
        return jnp.where(expand(noisy, x), correct(x, jnp.where(noisy, s, t)), x), carry

    return Sampler(step, init=predictor.init, calls=predictor.calls + repeats)
