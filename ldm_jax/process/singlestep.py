"""Sampling methods that remember nothing: each step needs x, the two times and a few calls of the denoiser. See stepping.py."""
import jax
import jax.numpy as jnp

from ldm_jax.process.gaussians import interpolated_log_variance, posterior_mean
from ldm_jax.process.stepping import (
    Sampler,
    check_option,
    ddim_move,
    decay,
    estimate,
    exponential_move,
    finite_or,
    half_logsnr,
    lost,
    noise_ratio,
    order_if,
    scales,
    whole,
)
from ldm_jax.types import Array, UserError, expand, fold_in, normal, split_prediction


def ddpm(variance: str = "small") -> Sampler:
    """Ancestral sampling: a draw from equation (1) with the denoiser's x0 in place of the true one.

    variance: "small" is that of q(x_s | x_t, x0), "large" that of q(x_t | x_s) (Ho et al. 2020, section 3.2), "learned" lies
    between the two as the denoiser's frac says (Nichol & Dhariwal 2021, eq. 15). The last step, into sigma = 0, adds no noise.

    Raises:
      UserError: for another variance, and for "learned" with a denoiser that has no frac.
    """
    check_option("ddpm", "variance", variance, ("small", "large", "learned"))

    def step(denoise, schedule, x, t, s, key, carry):
        x0, frac = split_prediction(denoise(x, t))
        if variance == "learned":
            if frac is None:
                raise UserError("variance='learned' of sampler 'ddpm' needs a network that learns one; choose from: large, small")
            std = jnp.exp(0.5 * interpolated_log_variance(schedule, t, s, frac))
        else:
            std = expand(jnp.sqrt(lost(schedule, t, s)) * schedule.sigma(s if variance == "small" else t), x)
        noise = jnp.where(expand(schedule.sigma(s) > 0, x), std * normal(key, x.shape), 0.0)
        return posterior_mean(schedule, x0, x, t, s) + noise, carry

    return Sampler(step, on_grid=True)


def ddim(eta=0.0, bound=jnp.inf) -> Sampler:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z, v = eta^2 (1 - r) sigma_s^2 (Song, Meng & Ermon 2021, eqs. 12, 16).

    eta = 0 is deterministic and integrates equation (4) by Euler's method; eta = 1 is `ddpm`. A scalar or [B], traced.
    bound: x0 is clipped to [-bound, bound] and eps is left as it was, which many published models are sampled with; where both
    should follow, clip the denoiser. A scalar or [B], traced.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        x0, eps = estimate(denoise, schedule, x, t)
        limit = expand(bound, x)
        return ddim_move(schedule, jnp.clip(x0, -limit, limit), eps, t, s, key, eta), carry

    return Sampler(step, on_grid=True, order=order_if(eta == 0, 1))


def euler_ancestral(eta=1.0) -> Sampler:
    """Down to the ratio sqrt(tau_s^2 - up^2) by Euler's method in tau, then up to tau_s by noise, up = eta tau_s sqrt(1 - r).

    The method known by this name in image samplers; it is `ddim` with eta = 1 instead of 0.
    """
    return ddim(eta)


def ddim_inversion(iterations=1) -> Sampler:
    """From s = t' < t back up to t: the x_t from which `ddim` would go to x_s, by fixed-point iteration,

        x_t <- alpha_t (x_s - sigma_s e) / alpha_s + sigma_t e,    e = eps(x_t, t), starting from x_t = x_s.

    One iteration is the usual inversion (Song, Meng & Ermon 2021, section 4.3, and Mokady et al. 2023, with the network at the
    time that is reached): a round trip through it and `ddim` errs at first order in the step, with k iterations at order k. As
    the network is never asked at the time that is left, a start at t = 0 is regular. Where alpha_t = 0, eps is x_t itself whatever
    it is, and x0 is held fixed instead: x_t <- sigma_t (x_s - alpha_s x0) / sigma_s.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        (a_t, s_t), (a_s, s_s) = scales(schedule, t, x), scales(schedule, s, x)

        def iterate(_, guess):
            x0, eps = estimate(denoise, schedule, guess, s)
            given_x0 = s_s * (x - a_t * x0) / jnp.where(s_t > 0, s_t, 1.0)
            given_eps = a_s * (x - s_t * eps) / a_t + s_s * eps
            return jnp.where((a_s <= 0) & (s_t > 0), given_x0, given_eps).astype(x.dtype)

        return jax.lax.fori_loop(0, whole(iterations), iterate, x), carry

    return Sampler(step, on_grid=True, order=1, calls=iterations, upwards=True)


def _derivative(f, t: Array, s: Array) -> Array:
    """df/dt at t; where it is infinite or undefined, the slope of the secant to s."""
    _, slope = jax.jvp(f, (t,), (jnp.ones_like(t),))
    return finite_or(slope, (f(s) - f(t)) / (s - t))


def euler() -> Sampler:
    """Euler's method in t: x_s = x_t + (s - t) (alpha'(t) x0 + sigma'(t) eps), equation (3).

    On rectified flow that is x_t + (s - t) (eps - x0).

    Where a derivative is infinite the secant from t to s replaces it; with both replaced the step is that of `ddim`.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        x0, eps = estimate(denoise, schedule, x, t)
        d_alpha, d_sigma = _derivative(schedule.alpha, t, s), _derivative(schedule.sigma, t, s)
        return x + expand((s - t) * d_alpha, x) * x0 + expand((s - t) * d_sigma, x) * eps, carry

    return Sampler(step, on_grid=True, order=1)


def euler_maruyama(eta=1.0) -> Sampler:
    """The Euler-Maruyama method in t on the reverse SDE (Song et al. 2021, eq. 6, and Karras et al. 2022, eq. 6):

        dx = alpha' x0 dt + sigma' eps dt + eta^2 g^2 / (2 sigma) eps dt + eta g dw,    g^2 = -sigma^2 dlogsnr/dt.

    eta scales the noise, 0 is `euler`; a scalar or [B], traced. The step into sigma = 0 adds no noise. Where a coefficient is
    infinite, as at alpha = 0, the step is that of `ddim` with this eta.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        x0, eps = estimate(denoise, schedule, x, t)
        ones = jnp.ones_like(t)
        d_alpha, d_sigma, d_logsnr = (jax.jvp(f, (t,), (ones,))[1] for f in (schedule.alpha, schedule.sigma, schedule.logsnr))
        regular = jnp.isfinite(d_alpha) & jnp.isfinite(d_sigma) & jnp.isfinite(d_logsnr)
        d_alpha, d_sigma, d_logsnr = (jnp.where(regular, (s - t) * d, 0.0) for d in (d_alpha, d_sigma, d_logsnr))
        v = expand(eta, x) ** 2 * expand(d_logsnr, x)  # eta^2 g^2 (t - s) / sigma^2
        sigma = expand(schedule.sigma(t), x)
        noise = jnp.where(expand(schedule.sigma(s) > 0, x), sigma * jnp.sqrt(v) * normal(key, x.shape), 0.0)
        moved = x + expand(d_alpha, x) * x0 + (expand(d_sigma, x) - 0.5 * sigma * v) * eps + noise
        return jnp.where(expand(regular, x), moved, ddim_move(schedule, x0, eps, t, s, key, eta)), carry

    return Sampler(step, on_grid=True, order=order_if(eta == 0, 1))


def heun() -> Sampler:
    """The trapezoidal rule on equation (3): a step of `ddim`, then the mean of x0 and of eps over its two ends.

    On x0 + sigma eps it is Heun's method in sigma (Karras et al. 2022, algorithm 1), on rectified flow Heun's method in t. The
    step into sigma = 0 stays that of `ddim`, as there; so does, walking upwards, the step out of it, with eps from its far end.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        (a_t, s_t), (a_s, s_s) = scales(schedule, t, x), scales(schedule, s, x)
        from_data, into_data = (schedule.sigma(u) <= 0 for u in (t, s))
        x0, eps = estimate(denoise, schedule, x, jnp.where(from_data, s, t))
        x0 = jnp.where(expand(from_data, x), (x - s_t * eps) / a_t, x0)
        first = a_s * x0 + s_s * eps
        x0_s, eps_s = estimate(denoise, schedule, first, jnp.where(into_data, t, s))
        second = first + 0.5 * ((a_s - a_t) * (x0_s - x0) + (s_s - s_t) * (eps_s - eps))
        second = jnp.where(expand(from_data, x), a_s * x0 + s_s * eps_s, second)
        return jnp.where(expand(into_data, x), first, second), carry

    return Sampler(step, on_grid=True, order=2, calls=2)


def edm(s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0) -> Sampler:
    """Heun's method in tau with churn, algorithm 2 of Karras et al. 2022, on x / alpha (their sigma is tau = sigma / alpha).

    In steps with s_tmin <= tau <= s_tmax, noise is first added to reach tau (1 + gamma), gamma = min(s_churn / steps, sqrt(2) -
    1), but never more than tau(1); s_noise scales it. s_churn = 0 is deterministic. All may be traced, each a scalar or [B].
    The step into sigma = 0, and that out of alpha = 0, has no second half; the latter has no churn either.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        steps = carry
        tau = noise_ratio(schedule, t)
        gamma = jnp.minimum(s_churn / steps, jnp.sqrt(2.0) - 1) * ((tau >= s_tmin) & (tau <= s_tmax))
        churned = (gamma > 0) & jnp.isfinite(tau)
        raised = schedule.t_of_logsnr(-2 * jnp.log(jnp.where(churned, tau * (1 + gamma), 1.0)))
        t_hat = jnp.where(churned, jnp.clip(raised, t, 1.0), t)
        tau_hat, a_hat = noise_ratio(schedule, t_hat), schedule.alpha(t_hat)
        added = jnp.where(churned, s_noise * a_hat * jnp.sqrt(jnp.maximum(tau_hat**2 - tau**2, 0.0)), 0.0)
        kept = jnp.where(churned, a_hat / jnp.where(churned, schedule.alpha(t), 1.0), 1.0)
        x = expand(kept, x) * x + expand(added, x) * normal(key, x.shape)

        x0, eps = estimate(denoise, schedule, x, t_hat)
        a_s, s_s = scales(schedule, s, x)
        first = a_s * x0 + s_s * eps
        two_halves = (schedule.sigma(s) > 0) & jnp.isfinite(tau_hat)
        _, eps_s = estimate(denoise, schedule, first, jnp.where(two_halves, s, t))
        width = jnp.where(two_halves, noise_ratio(schedule, s) - jnp.where(two_halves, tau_hat, 0.0), 0.0)
        return first + a_s * expand(0.5 * width, x) * jnp.where(expand(two_halves, x), eps_s - eps, 0.0), carry

    return Sampler(step, init=lambda x, steps: jnp.asarray(steps, jnp.float32), order=order_if(s_churn == 0, 2), calls=2)


def dpmpp_2s(eta=0.0, ratio=0.5) -> Sampler:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1): a call between the two times corrects x0.

    With h = lambda_s - lambda_t and that call at lambda_u = lambda_t + ratio h,

        x_s = (sigma_s / sigma_t) exp(-eta h) x_t + alpha_s (1 - exp(-(1 + eta) h)) D + sigma_s sqrt(1 - exp(-2 eta h)) z,
        D = x0_t + (x0_u - x0_t) / (2 ratio).

    eta = 0 is the ODE, eta = 1 the SDE, whose point in the middle lies on the same path of noise. A scalar or [B], traced.
    Where h is infinite, out of alpha = 0 or into sigma = 0, D = x0_t.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        lam_t, lam_s = half_logsnr(schedule, t), half_logsnr(schedule, s)
        regular = jnp.isfinite(lam_s - lam_t)
        middle = jnp.where(regular, lam_t + ratio * (lam_s - lam_t), 0.0)
        u = jnp.where(regular, schedule.t_of_logsnr(2 * middle), t)
        first, second = (decay(eta, half_logsnr(schedule, b) - lam_a) for lam_a, b in (
            (lam_t, u), (jnp.where(regular, half_logsnr(schedule, u), lam_t), s)))
        first = jnp.where(regular, first, 0.0)
        noise_u = jnp.sqrt(-jnp.expm1(-2 * first)) * schedule.sigma(u)
        noise_s = jnp.sqrt(-jnp.expm1(-2 * second)) * schedule.sigma(s)
        carried = jnp.where(regular, jnp.exp(-second) * schedule.sigma(s) / schedule.sigma(u), 0.0)
        z_u, z_s = normal(fold_in(key, 0), x.shape), normal(fold_in(key, 1), x.shape)

        x0, _ = split_prediction(denoise(x, t))
        x_u = exponential_move(schedule, x, x0, t, u, eta) + expand(noise_u, x) * z_u
        x0_u, _ = split_prediction(denoise(jnp.where(expand(regular, x), x_u, x), u))
        d = x0 + jnp.where(expand(regular, x), (x0_u - x0) / (2 * expand(ratio, x)), 0.0)
        return exponential_move(schedule, x, d, t, s, eta) + expand(carried * noise_u, x) * z_u + expand(noise_s, x) * z_s, carry

    return Sampler(step, order=order_if(eta == 0, 2), calls=2)
