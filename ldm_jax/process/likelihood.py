"""How probable a model finds given data: the variational bound, its limit of infinitely many steps, and the density of its flow.

The bound of a process with times t_0 < .. < t_{T-1} = 1 (Ho et al. 2020, eq. 5; Kingma et al. 2021, eq. 11), in nats:

    -log p(x0) <= KL( q(x_1 | x0) || N(0, sigma(1)^2) )                                         prior
                + sum_{k=1}^{T-1} E KL( q(x_{k-1} | x_k, x0) || p(x_{k-1} | x_k) )              diffusion
                + E[ -log p(x0 | x at t_0) ]                                                    decoder                 (1)

With the small variance a diffusion term is (SNR_s - SNR_t) / 2 E|x0 - x0_hat(x_t, t)|^2, so as T grows their sum becomes

    -1/2 int SNR'(t) E|x0 - x0_hat|^2 dt = 1/2 int E|eps - eps_hat|^2 dlogsnr                                          (2)

(Kingma et al. 2021, eqs. 13-18), from above: a step takes its error at the noisier of its two ends. The limit depends on the
schedule through the values of logsnr at the ends alone.

The flow moves x0 to x_1 by the probability-flow ODE, and log p(x0) = log p(x_1) + log |det dx_1 / dx0| (Song et al. 2021, section
4.3). It is solved for y = x_t / n, n = sqrt(alpha^2 + sigma^2), over u = -logsnr / 2. With c = alpha / n = sqrt(sigmoid(logsnr)),

    dy / du = c (c y - x0_hat(n y, t)),                                                                                (3)

whose right-hand side fades away at both ends, so that equal steps in u resolve every scale and nothing is stiff or divided by
sigma.
"""
import math
from typing import Callable, NamedTuple, Optional

import jax
import jax.numpy as jnp

from ldm_jax.process.gaussians import discretized_log_likelihood, interpolated_log_variance, kl, posterior_log_variances, vlb_term
from ldm_jax.process.schedules import Schedule
from ldm_jax.process.stepping import scales
from ldm_jax.types import Array, Denoise, UserError, example_keys, expand, fold_in, lookup, normal, split_prediction, uniform

LOGSNR_MIN = -20.0  # where integrals over logsnr end when alpha(1) = 0; what lies beyond is of the size of alpha / sigma = 5e-5
LOGSNR_MAX = 13.8  # where they begin: sigma / alpha = 1e-3, a quarter of half a level of 8-bit images


class Bound(NamedTuple):
    """Terms of equation (1) in bits per value, each averaged over what is drawn once.

    Attributes:
      total: their sum, [B].
      prior, decoder: [B].
      diffusion: in order of growing noise, [B, K]: K = T - 1 steps, or K strata of logsnr.
    """
    total: Array
    prior: Array
    decoder: Array
    diffusion: Array


def _bound(x0: Array, prior: Array, decoder: Array, diffusion: Array) -> Bound:
    """Bound from nats: prior and decoder [B], diffusion [K, B]."""
    bits = 1.0 / (x0.size // x0.shape[0] * math.log(2.0))
    return Bound((prior + decoder + jnp.sum(diffusion, 0)) * bits, prior * bits, decoder * bits, diffusion.T * bits)


def _total(x: Array) -> Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _prior(schedule: Schedule, x0: Array) -> Array:
    """KL( q(x_1 | x0) || N(0, sigma(1)^2 I) ), nats [B]; the model's prior is the one that `prior` of samplers.py draws from."""
    one = jnp.float32(1.0)
    logvar = 2 * jnp.log(schedule.sigma(one))
    return _total(kl(schedule.alpha(one) * x0, logvar, jnp.zeros_like(x0), logvar))


def _decoder(x0: Array, mean: Array, logvar: Array, bins: Optional[int]) -> Array:
    """-log p(x0 | mean, logvar), elementwise nats: of x0's bin, or the density where `bins` is None."""
    if bins is None:
        return 0.5 * (math.log(2 * math.pi) + logvar + (x0 - mean) ** 2 * jnp.exp(-logvar))
    return -discretized_log_likelihood(x0, mean, 0.5 * logvar, bins)


def _range(schedule: Schedule, logsnr_max: Optional[float]):
    """(high, low): the ends of integrals over logsnr, inside what the schedule has."""
    if logsnr_max is not None and not LOGSNR_MIN < logsnr_max < math.inf:
        raise UserError(f"logsnr_max must be finite and above {LOGSNR_MIN:g}; got {logsnr_max}")
    first = jnp.float32(1.0 / schedule.timesteps if schedule.timesteps and logsnr_max is None else 1e-6)
    high = jnp.minimum(schedule.logsnr(first), LOGSNR_MAX if logsnr_max is None else logsnr_max)
    return high, jnp.maximum(schedule.logsnr(jnp.float32(1.0)), LOGSNR_MIN)


def vlb_bpd(denoise: Denoise, schedule: Schedule, x0: Array, key: Array, *, steps: Optional[int] = None, variance: str = "small",
            bins: Optional[int] = 256) -> Bound:
    """Equation (1), every term with one draw of its x_t, for T steps on the grid t_k = (k + 1) / T.

    Args:
      denoise: (x_t [B, ...], t [B]) -> x0, or (x0, frac) where a variance is learned.
      x0: data [B, ...] in [-1, 1] on `bins` levels; any float32 with bins=None.
      key: one key, or one per example. The noise of example i at step k depends on its key and k only.
      steps: T; the schedule's own number by default.
      variance: of p where none is learned: "small" or "large" (Ho et al. 2020, section 3.2). The decoder's is the one
        `posterior_log_variances` gives into t = 0.
      bins: levels of the data; None takes the decoder's density, for latents and other continuous data.

    Returns:
      Bound, bits per value; diffusion[:, k - 1] is L_k of Nichol & Dhariwal 2021.

    Raises:
      UserError: for a continuous schedule without `steps`, and for an unknown variance.
    """
    T = steps or schedule.timesteps
    if not T:
        raise UserError(f"schedule {schedule.name!r} is continuous, so its bound needs a number of steps: pass steps=, or use "
                        "vlb_limit_bpd")
    if variance not in ("small", "large"):
        raise UserError(f"unknown variance {variance!r} of vlb_bpd; choose from: large, small")
    keys = example_keys(key, x0.shape[0])

    def term(_, k):
        t, s = (jnp.broadcast_to(i / jnp.float32(T), x0.shape[:1]) for i in (k + 1, k))
        alpha, sigma = scales(schedule, t, x0)
        x_t = alpha * x0 + sigma * normal(fold_in(keys, k), x0.shape)
        prediction, frac = split_prediction(denoise(x_t, t))
        if frac is None:
            logvar = expand(posterior_log_variances(schedule, t, s)[("small", "large").index(variance)], x0)
        else:
            logvar = interpolated_log_variance(schedule, t, s, frac)
        nats = vlb_term(schedule, x0, x_t, t, s, prediction, logvar, bins or 256)
        if bins is None:
            nats = jnp.where(k == 0, _decoder(x0, prediction, logvar, None), nats)
        return None, _total(nats)

    _, terms = jax.lax.scan(term, None, jnp.arange(T))
    return _bound(x0, _prior(schedule, x0), terms[0], terms[1:])


def vlb_limit_bpd(denoise: Denoise, schedule: Schedule, x0: Array, key: Array, *, samples: int = 100,
                  logsnr_max: Optional[float] = None, bins: Optional[int] = 256) -> Bound:
    """The bound of infinitely many steps, equation (2), with one draw in each of `samples` strata of logsnr.

    The decoder is a Gaussian about x0_hat with the standard deviation sigma / alpha, both at logsnr_max. Unbiased for any number
    of samples but for the part of (2) below logsnr = -20, less than e^-20 |x0 - x0_hat|^2 / 2 nats. It may be differentiated with
    respect to the network, not to a learned schedule, whose times it finds by `t_of_logsnr`.

    Args:
      samples: K.
      logsnr_max: where the diffusion ends and the decoder begins; by default that of t_0 = 1 / T in a discrete process, at most
        13.8.
      Others as in `vlb_bpd`; a learned variance plays no part.
    """
    high, low = _range(schedule, logsnr_max)
    keys = example_keys(key, x0.shape[0])

    def term(_, k):  # k = 0 is the decoder, so that the network is compiled once
        at = fold_in(keys, k)
        logsnr = high - (high - low) * (k - uniform(fold_in(at, 0), x0.shape[0])) / samples
        logsnr = jnp.where(k == 0, high, logsnr)
        t = schedule.t_of_logsnr(logsnr)
        alpha, sigma = scales(schedule, t, x0)
        x_t = alpha * x0 + sigma * normal(fold_in(at, 1), x0.shape)
        x0_hat = split_prediction(denoise(x_t, t))[0]
        diffusion = 0.5 * (high - low) / samples * jnp.exp(logsnr) * _total((x0 - x0_hat) ** 2)
        return None, jnp.where(k == 0, _total(_decoder(x0, x0_hat, -high, bins)), diffusion)

    _, terms = jax.lax.scan(term, None, jnp.arange(samples + 1))
    return _bound(x0, _prior(schedule, x0), terms[0], terms[1:])


def _each(draw: Callable) -> Callable:
    return lambda key, shape, n: jnp.stack([jax.vmap(lambda k: draw(k, shape[1:]))(fold_in(example_keys(key, shape[0]), i))
                                            for i in range(n)])


def _unit_vectors(key: Array, shape, n: int) -> Array:
    size = math.prod(shape[1:])
    basis = jnp.sqrt(jnp.float32(size)) * jnp.eye(size).reshape((size, 1) + tuple(shape[1:]))
    return jnp.broadcast_to(basis, (size,) + tuple(shape))


# name -> (key, shape [B, ...], n) -> e [P, B, ...] with E[e e^T] = I, so that tr J = E[e . J e] (Hutchinson 1990; Grathwohl et
# al. 2019). "rademacher" has the least variance of all independent probes, none from the diagonal of J; "exact" takes D of them.
PROBES = {
    "rademacher": _each(lambda key, shape: jax.random.rademacher(key, shape, jnp.float32)),
    "gaussian": _each(lambda key, shape: jax.random.normal(key, shape, jnp.float32)),
    "exact": _unit_vectors,
}

# classical Runge-Kutta of order 4: (where a stage lies in the step, its weight)
RK4 = ((0.0, 1 / 6), (0.5, 1 / 3), (0.5, 1 / 3), (1.0, 1 / 6))


def ode_logp(denoise: Denoise, schedule: Schedule, x0: Array, key: Array, *, steps: int = 100, probe: str = "rademacher",
             probes: int = 1, logsnr_max: Optional[float] = None, prior_logp: Optional[Callable[[Array], Array]] = None) -> Array:
    """log p(x0) under the probability flow, nats [B], by equation (3) with Runge-Kutta steps of order 4 equally long in logsnr.

    What is measured is the density of x_t / alpha at logsnr_max, in place of that at infinity: data smoothed by a Gaussian of
    standard deviation tau = exp(-logsnr_max / 2), whose log density differs by about tau^2 / 2 times the Laplacian of p over p.
    Where alpha(1) = 0 the flow ends at logsnr = -20. For images, dequantise first and convert with `bits_per_dim`.

    Args:
      denoise: (x_t [B, ...], t [B]) -> x0; must allow forward-mode differentiation.
      x0: continuous data [B, ...], float32.
      key: for the probes, one key, or one per example; the same probe is kept along a path, which keeps log p unbiased.
      steps: each asks the denoiser four times, with a derivative along every probe.
      probe: a row of PROBES. "exact" takes as many derivatives as x0 has values.
      probes: how many random ones are averaged.
      logsnr_max: where the flow begins; by default that of t_0 = 1 / T in a discrete process, at most 13.8 (tau = 1e-3).
      prior_logp: x_1 [B, ...] -> log density [B]; N(0, sigma(1)^2 I), from which samples start, by default.

    Raises:
      UserError: for an unknown probe, or a logsnr_max that is infinite or below -20.
    """
    directions = lookup(PROBES, probe, "probe")(key, x0.shape, probes)
    high, low = _range(schedule, logsnr_max)
    h = 0.5 * (high - low) / steps
    batch, size = x0.shape[0], x0.size // x0.shape[0]

    def field(logsnr, y):
        """Equation (3) and the trace of its Jacobian."""
        t = jnp.broadcast_to(schedule.t_of_logsnr(logsnr), (batch,))
        n = expand(jnp.hypot(schedule.alpha(t), schedule.sigma(t)), y)
        c = jnp.exp(0.5 * jax.nn.log_sigmoid(logsnr))
        dy, jacobian = jax.linearize(lambda y: c * (c * y - split_prediction(denoise(n * y, t))[0]), y)
        return dy, jnp.mean(jax.vmap(lambda e: _total(e * jacobian(e)))(directions), 0)

    def step(state, i):
        def stage(carry, row):
            (slope, change), (at, weight) = carry, row
            slope = field(high - 2 * h * (i + at), state[0] + at * h * slope[0])
            return (slope, jax.tree.map(lambda c, k: c + weight * h * k, change, slope)), None

        zero = jax.tree.map(jnp.zeros_like, state)
        (_, change), _ = jax.lax.scan(stage, (zero, zero), jnp.array(RK4, jnp.float32))
        return jax.tree.map(jnp.add, state, change), None

    y = x0 * jnp.exp(0.5 * jax.nn.log_sigmoid(high))
    (y, logdet), _ = jax.lax.scan(step, (y, jnp.zeros(batch)), jnp.arange(steps))
    end = schedule.t_of_logsnr(low)
    sigma, n = schedule.sigma(end), jnp.hypot(schedule.alpha(end), schedule.sigma(end))
    x_1 = n * y
    if prior_logp is None:
        logp = -0.5 * _total((x_1 / sigma) ** 2) - size * (0.5 * math.log(2 * math.pi) + jnp.log(sigma))
    else:
        logp = prior_logp(x_1)
    return logp + logdet + size * (jnp.log(n) + 0.5 * jax.nn.log_sigmoid(high))


def dequantize(x0: Array, key: Array, bins: int = 256) -> Array:
    """x0 with uniform noise over its bin: data on `bins` levels of [-1, 1] become continuous (Theis et al. 2016, section 3.1).

    Levels stay the centres of their bins, each 2 / (bins - 1) wide, which is the scale that networks are trained on.
    """
    keys = example_keys(key, x0.shape[0])
    noise = jax.vmap(lambda k: jax.random.uniform(k, x0.shape[1:], jnp.float32, -1.0, 1.0))(keys)
    return x0 + noise / (bins - 1)


def bits_per_dim(logp: Array, dims: int, bins: Optional[int] = None) -> Array:
    """-logp / (dims log 2), for dequantised data + log2((bins - 1) / 2): a bound on the bits per value of the levels themselves.

    E_noise[log p(dequantised)] + dims log(2 / (bins - 1)) <= log P(levels), as the density integrates to P over a bin (Jensen);
    the offset is log2(127.5) = 6.994 for 256 levels.
    """
    return -logp / (dims * math.log(2.0)) + (math.log2((bins - 1) / 2) if bins else 0.0)
