"""Sampling methods that remember the denoiser's earlier answers: one network call a step. See stepping.py.

Each puts a polynomial through the newest answers and integrates it exactly. In u, 0 at the time t of the newest answer and 1 at
the time s aimed at, and with answers f_k at u_k (u_0 = 0), Newton's form is sum_j c_j e_j(u), e_j(u) = prod_{k < j} (u - u_k),
and with the moments I_k of the weight the integral is sum_j c_j sum_k e_jk I_k. The answers are x0 and u runs in lambda,

    x_s = (sigma_s / sigma_t) exp(-eta h) x_t + alpha_s H int_0^1 exp(-H (1 - u)) x0(u) du + sigma_s sqrt(1 - exp(-2 eta h)) z,
    h = lambda_s - lambda_t,    H = (1 + eta) h                                                                         (5)

(Lu et al. 2022b: the solution of equation (4) for eta = 0, of the reverse SDE for eta = 1), or they are eps and u runs in tau,

    x_s = alpha_s x0_t + sigma_s eps_t + alpha_s (tau_s - tau_t) int_0^1 (eps(u) - eps_t) du.                           (6)

The order is lowered where there is no more to remember: to one at the first step, to two at the second, and so on. An answer at
lambda = -inf (alpha = 0) is left out of the polynomial, and so is every old one in the step into lambda = inf (sigma = 0) in
form (5), which makes these steps those of `ddim`.
"""
from typing import NamedTuple, Optional, Sequence, Tuple

import jax
import jax.numpy as jnp

from ldm_jax.process.schedules import Schedule
from ldm_jax.process.stepping import Sampler, check_option, decay, estimate, half_logsnr, noise_ratio, order_if, scales
from ldm_jax.types import Array, expand, normal, split_prediction


class History(NamedTuple):
    """The newest answers first: times [n, B], nan where there is none yet, and values [n, B, ...]."""
    times: Array
    values: Array


def no_history(x: Array, n: int) -> History:
    return History(jnp.full((n, x.shape[0]), jnp.nan, x.dtype), jnp.zeros((n, *x.shape), x.dtype))


def remember(history: History, t: Array, value: Array) -> History:
    def push(old, new):
        return jnp.concatenate([new[None].astype(old.dtype), old[:-1]])
    return History(push(history.times, t), push(history.values, value))


def _newest(n: int, order, like: Array) -> Array:
    """[n, B], true for the first `order` entries; order: a number or [B], traced, or None for all."""
    order = jnp.broadcast_to(n if order is None else order, like.shape)
    return jnp.arange(n)[:, None] < order[None]


def _nodes(position: Array, origin: Array, width: Array, usable: Array) -> Tuple[Array, Array]:
    """u [n, B], 0 for the first, and which may be used: not those a million steps away, whose powers overflow."""
    u = jnp.where(usable, (position - origin[None]) / width[None], 0.0).at[0].set(0.0)
    near = jnp.abs(u) < 1e6
    return jnp.where(near, u, 0.0), usable & near


def exponential_moments(h: Array, n: int) -> Sequence[Array]:
    """I_k = h int_0^1 exp(-h (1 - u)) u^k du for k < n, shaped like h: 1 - exp(-h), then 1 - k I_{k-1} / h; h = inf gives 1.

    For h < 1 by its series sum_j (-1)^j h^(j+1) k! / (k + j + 1)!, since the recursion cancels.
    """
    moments, small = [-jnp.expm1(-h)], jnp.where(h < 1, h, 0.0)
    for k in range(1, n):
        term, series = small / (k + 1), 0.0
        for j in range(18):
            series, term = series + term, -term * small / (k + j + 2)
        moments.append(jnp.where(h < 1, series, 1 - k * moments[-1] / jnp.where(h < 1, 1.0, h)))
    return moments


def uniform_moments(n: int) -> Sequence[float]:
    """int_0^1 u^k du for k < n."""
    return [1 / (k + 1) for k in range(n)]


def newton(u: Array, usable: Array, values: Array) -> Sequence[Array]:
    """Newton's coefficients c_j [B, ...] of the polynomial through values [n, B, ...] at u [n, B].

    c_j is 0 unless the first j + 1 nodes are all usable, a boolean [n, B]; that lowers the degree.
    """
    n, x = len(u), values[0]
    row, ok, coefficients = list(values), list(usable), [x]
    for j in range(1, n):
        ok = [ok[i] & usable[i + j] for i in range(n - j)]
        gap = [jnp.where(ok[i], u[i + j] - u[i], 1.0) for i in range(n - j)]
        row = [jnp.where(expand(ok[i], x), (row[i + 1] - row[i]) / expand(gap[i], x), 0.0) for i in range(n - j)]
        coefficients.append(row[0])
    return coefficients


def integrate(u: Array, coefficients: Sequence[Array], moments: Sequence) -> Array:
    """sum_j c_j sum_k e_jk I_k [B, ...], for u [n, B] and I_k [B] or numbers."""
    x = coefficients[0]
    basis, total = [1.0], 0.0  # of e_j, lowest power first
    for j, c in enumerate(coefficients):
        total = total + expand(jnp.broadcast_to(sum(e * i for e, i in zip(basis, moments)), x.shape[:1]), x) * c
        basis = [high - u[j] * low for high, low in zip([0.0, *basis], [*basis, 0.0])]
    return total


def exponential_step(schedule: Schedule, x: Array, t: Array, s: Array, history: History, *, eta=0.0, order=None,
                     line: Optional[str] = None) -> Array:
    """Equation (5) without its noise, from t to s.

    Args:
      history: x0 at t first, then at any other times, s included.
      order: use no more than this many answers; a number or [B], traced.
      line: how two answers, a straight line, are integrated: None is exact, "bh2" takes I_0 / 2 and "bh1" h / 2 for I_1, which
        are as good at this order.
    """
    lam_t, lam_s, lam = half_logsnr(schedule, t), half_logsnr(schedule, s), half_logsnr(schedule, history.times)
    h = lam_s - lam_t
    regular = jnp.isfinite(h)
    usable = regular[None] & jnp.isfinite(lam) & _newest(len(lam), order, h)
    u, usable = _nodes(lam, jnp.where(regular, lam_t, 0.0), jnp.where(regular, h, 1.0), usable)
    d = decay(eta, h)
    moments = exponential_moments(h + d, len(lam))
    c = newton(u, usable, history.values)
    total = integrate(u, c, moments)
    if line is not None and len(c) > 1:
        half = 0.5 * (moments[0] if line == "bh2" else jnp.where(regular, h + d, 0.0))
        two = usable[1] if len(c) == 2 else usable[1] & ~usable[2]
        total = jnp.where(expand(two, x), expand(moments[0], x) * c[0] + expand(half, x) * c[1], total)
    keep = schedule.sigma(s) / schedule.sigma(t) * jnp.exp(-d)
    return expand(keep, x) * x + expand(schedule.alpha(s), x) * total


def _dpmpp(n: int, eta, line: Optional[str]) -> Sampler:
    def step(denoise, schedule, x, t, s, key, history):
        x0, _ = split_prediction(denoise(x, t))
        history = remember(history, t, x0)
        noise = schedule.sigma(s) * jnp.sqrt(-jnp.expm1(-2 * decay(eta, half_logsnr(schedule, s) - half_logsnr(schedule, t))))
        moved = exponential_step(schedule, x, t, s, history, eta=eta, line=line)
        return moved + expand(noise, x) * normal(key, x.shape), history

    return Sampler(step, on_grid=True, init=lambda x, steps: no_history(x, n), order=order_if(eta == 0, n))


def dpmpp_2m(eta=0.0, solver: str = "midpoint") -> Sampler:
    """DPM-Solver++(2M): equation (5) with the two newest x0.

    eta = 0 is the ODE (Lu et al. 2022b, algorithm 2), eta = 1 the SDE; a scalar or [B], traced.
    solver: "midpoint" takes I_0 / 2 for I_1, as the paper; "heun" integrates the line exactly.
    """
    check_option("dpmpp_2m", "solver", solver, ("midpoint", "heun"))
    return _dpmpp(2, eta, "bh2" if solver == "midpoint" else None)


def dpmpp_3m(eta=0.0) -> Sampler:
    """DPM-Solver++(3M): equation (5) with the three newest x0, integrated exactly. eta as in `dpmpp_2m`.

    The second derivative is twice the second divided difference; image samplers of this name use the difference itself, which
    leaves an error of the second order.
    """
    return _dpmpp(3, eta, None)


def dpmpp_2m_sde(eta=1.0, solver: str = "midpoint") -> Sampler:
    """`dpmpp_2m` on the reverse SDE."""
    return dpmpp_2m(eta, solver)


def dpmpp_3m_sde(eta=1.0) -> Sampler:
    """`dpmpp_3m` on the reverse SDE."""
    return dpmpp_3m(eta)


def unipc(order=2, variant: str = "bh2") -> Sampler:
    """UniPC (Zhao et al. 2023): predict with `order` answers; when the next one arrives, redo that step with it as well.

    Converges at order + 1. order: 1, 2 or 3, a number or [B], may be traced. variant: "bh1" or "bh2", the paper's two B(h), which
    differ only where two answers are used. The last step is not corrected, as that would take one more call.
    """
    check_option("unipc", "order", order, (1, 2, 3))
    check_option("unipc", "variant", variant, ("bh1", "bh2"))

    def step(denoise, schedule, x, t, s, key, carry):
        corrected, history = carry
        x0, _ = split_prediction(denoise(x, t))
        before = history.times[0]
        first = jnp.isnan(before)
        with_new = History(*(jnp.concatenate([old[:1], new[None].astype(old.dtype), old[1:]])
                             for old, new in zip(history, (t, x0))))
        from_t = jnp.where(first, t, before)
        with_new = with_new._replace(times=with_new.times.at[0].set(from_t))
        redone = exponential_step(schedule, corrected, from_t, t, with_new, order=order + 1, line=variant)
        reached = jnp.isfinite(half_logsnr(schedule, t) - half_logsnr(schedule, from_t)) & ~first
        x = jnp.where(expand(reached, x), redone, x).astype(x.dtype)
        history = remember(history, t, x0)
        return exponential_step(schedule, x, t, s, history, order=order, line=variant), (x, history)

    return Sampler(step, on_grid=True, init=lambda x, steps: (x, no_history(x, 3)),
                   order=min(order + 1, 3) if isinstance(order, int) else None)


def _with_mean_eps(schedule: Schedule, x0: Array, eps: Array, mean: Array, t: Array, s: Array) -> Array:
    """Equation (6) with `mean` for the mean of eps(u), and that of `ddim` where tau_t = inf."""
    a_s, s_s = scales(schedule, s, eps)
    tau = noise_ratio(schedule, t)
    regular = jnp.isfinite(tau)
    width = jnp.where(regular, noise_ratio(schedule, s) - jnp.where(regular, tau, 0.0), 0.0)
    return a_s * x0 + s_s * eps + a_s * expand(width, eps) * jnp.where(expand(regular, eps), mean - eps, 0.0)


def lms(order=4) -> Sampler:
    """The linear multistep method: equation (6) with up to `order` answers (Adams-Bashforth for unequal steps).

    order: 1 to 4, a number or [B], may be traced.
    """
    check_option("lms", "order", order, (1, 2, 3, 4))

    def step(denoise, schedule, x, t, s, key, history):
        x0, eps = estimate(denoise, schedule, x, t)
        history = remember(history, t, eps)
        tau, tau_t = noise_ratio(schedule, history.times), noise_ratio(schedule, t)
        usable = jnp.isfinite(tau) & jnp.isfinite(history.times) & _newest(4, order, t)
        origin = jnp.where(usable[0], tau_t, 0.0)
        u, usable = _nodes(tau, origin, jnp.where(usable[0], noise_ratio(schedule, s) - origin, 1.0), usable)
        mean = integrate(u, newton(u, usable, history.values), uniform_moments(4))
        return _with_mean_eps(schedule, x0, eps, mean, t, s), history

    return Sampler(step, on_grid=True, init=lambda x, steps: no_history(x, 4), order=order if isinstance(order, int) else None)


def pndm(start: str = "heun") -> Sampler:
    """PNDM (Liu et al. 2022): equation (6) with up to four answers taken as if equally spaced, so meant for grids uniform in t.

    With (3, -1)/2, (23, -16, 5)/12 and (55, -59, 37, -9)/24 for the mean of eps (PLMS in image samplers). At each end
    of a grid that is uniform in t the order is two.

    start: "heun" makes the first step with the mean of eps at its two ends, one call more (S-PNDM); "runge_kutta" makes the first
    three by their pseudo Runge-Kutta method, with the call in the middle in t, three calls more each (F-PNDM). The calls at the
    far end of a step into sigma = 0 are left out.
    """
    check_option("pndm", "start", start, ("heun", "runge_kutta"))
    u = -jnp.arange(4.0)[:, None]

    def step(denoise, schedule, x, t, s, key, carry):
        history, count = carry
        x0, eps = estimate(denoise, schedule, x, t)
        history = remember(history, t, eps)
        into_data = schedule.sigma(s) <= 0

        def move(mean, to):
            return _with_mean_eps(schedule, x0, eps, mean, t, to).astype(x.dtype)

        def ask(mean, to):
            return estimate(denoise, schedule, move(mean, to), jnp.where(into_data, t, to))[1]

        def multistep():
            return integrate(jnp.broadcast_to(u, history.times.shape), newton(u, jnp.isfinite(history.times), history.values),
                             uniform_moments(4)).astype(x.dtype)

        def starting():
            if start == "heun":
                mean = 0.5 * (eps + ask(eps, s))
            else:
                middle = 0.5 * (s + t)
                second = ask(eps, middle)
                third = ask(second, middle)
                mean = (eps + 2 * second + 2 * third + ask(third, s)) / 6
            return jnp.where(expand(into_data, x), eps, mean).astype(x.dtype)

        mean = jax.lax.cond(count < (1 if start == "heun" else 3), starting, multistep)
        return move(mean, s), (history, count + 1)

    return Sampler(step, on_grid=True, init=lambda x, steps: (no_history(x, 4), jnp.int32(0)), order=2)
