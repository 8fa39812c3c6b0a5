"""Data distributions whose denoisers are known in closed form, so that what the library computes has a right answer.

For x_t = a x0 + s eps and x0 ~ N(m, C):  E[x0 | x_t] = m + a C (a^2 C + s^2 I)^-1 (x_t - a m). A mixture averages its
components' answers with the posterior weights of the components. All work on vectors: x_t [B, D], t [B].
"""
import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Mixture:
    """sum_k weights_k N(means_k, covs_k): weights [K], means [K, D], covs [K, D, D]."""
    weights: np.ndarray
    means: np.ndarray
    covs: np.ndarray

    def mean(self):
        return self.weights @ self.means

    def cov(self):
        centred = self.means - self.mean()
        return np.einsum("k,kij->ij", self.weights, self.covs) + np.einsum("k,ki,kj->ij", self.weights, centred, centred)

    def draw(self, key, n):
        key_k, key_z = jax.random.split(key)
        k = jax.random.choice(key_k, len(self.weights), (n,), p=jnp.asarray(self.weights))
        z = jax.random.normal(key_z, (n, self.means.shape[1]))
        return jnp.asarray(self.means)[k] + jnp.einsum("bij,bj->bi", jnp.asarray(np.linalg.cholesky(self.covs + 0.0))[k], z)

    def _parts(self, schedule, x_t, t):
        """For each component: residual in the eigenbasis [B, K, D], its variance [B, K, D], eigenvalues [K, D], basis [K, D, D]."""
        lam, U = np.linalg.eigh(self.covs)
        lam, U, means = (jnp.asarray(c, x_t.dtype) for c in (np.maximum(lam, 0.0)[None], U, self.means[None]))
        a, s = (jnp.broadcast_to(f(t), x_t.shape[:1])[:, None, None] for f in (schedule.alpha, schedule.sigma))
        residual = jnp.einsum("kij,bki->bkj", U, x_t[:, None, :] - a * means)
        return residual, a**2 * lam + s**2, a, lam, U

    def log_posterior(self, schedule, x_t, t):
        """log p(component | x_t), [B, K]; and log p(x_t), [B]."""
        residual, var, _, _, _ = self._parts(schedule, x_t, t)
        log_joint = jnp.asarray(np.log(self.weights), x_t.dtype)[None] - 0.5 * jnp.sum(residual**2 / var + jnp.log(2 * jnp.pi * var), -1)
        total = jax.nn.logsumexp(log_joint, -1)
        return log_joint - total[:, None], total

    def log_prob(self, schedule, x_t, t):
        """log p_t(x_t), [B]."""
        return self.log_posterior(schedule, x_t, t)[1]

    def denoiser(self, schedule):
        """denoise(x_t, t) = E[x0 | x_t]."""
        def denoise(x_t, t):
            residual, var, a, lam, U = self._parts(schedule, x_t, t)
            x0 = jnp.asarray(self.means, x_t.dtype)[None] + jnp.einsum("kij,bkj->bki", U, a * lam / var * residual)  # [B, K, D]
            if len(self.weights) == 1:
                return x0[:, 0]
            return jnp.einsum("bk,bki->bi", jnp.exp(self.log_posterior(schedule, x_t, t)[0]), x0)
        return denoise


def gaussian(mean, cov) -> Mixture:
    return Mixture(np.ones(1), np.asarray(mean, float)[None], np.asarray(cov, float)[None])


def point_mass(x) -> Mixture:
    x = np.asarray(x, float)
    return gaussian(x, np.zeros((x.size, x.size)))


GAUSSIAN = gaussian([0.7, -0.4], [[0.5, 0.2], [0.2, 0.3]])
MIXTURE = Mixture(np.array([0.3, 0.5, 0.2]), np.array([[1.5, 0.0], [-0.8, 1.0], [0.0, -1.2]]),
                  np.array([[[0.10, 0.03], [0.03, 0.20]], [[0.15, -0.05], [-0.05, 0.08]], [[0.05, 0.0], [0.0, 0.05]]]))


def side_by_side(schedules, each=1):
    """One schedule whose examples i * each .. follow schedules[i]: many schedules in one compilation. Examples: t's last axis."""
    n = len(schedules)

    def pick(name):
        def f(t):
            t = jnp.broadcast_to(t, jnp.broadcast_shapes(jnp.shape(t), (n * each,)))
            parts = t.reshape(t.shape[:-1] + (n, each))
            return jnp.stack([getattr(s, name)(parts[..., i, :]) for i, s in enumerate(schedules)], -2).reshape(t.shape)
        return f

    functions = {name: pick(name) for name in ("alpha", "sigma", "logsnr", "t_of_logsnr")}
    return dataclasses.replace(schedules[0], name="side_by_side", timesteps=None, **functions)


def ode_solution(mixture, y, lam_from, lam_to, steps=2000):
    """x / alpha after the probability-flow ODE from lambda = log(alpha / sigma) = lam_from to lam_to, starting from y [B, D].

    d y / d log(tau) = y - E[x0 | y, tau], tau = exp(-lambda), by the classical Runge-Kutta method; the same for every schedule.
    """
    class VE:
        alpha, sigma = staticmethod(jnp.ones_like), staticmethod(jnp.exp)  # of log tau

    denoise = mixture.denoiser(VE)
    h = (lam_from - lam_to) / steps

    def f(y, u):
        return y - denoise(y, jnp.full(y.shape[:1], u, y.dtype))

    def step(y, i):
        u = -lam_from + i * h
        k1 = f(y, u)
        k2 = f(y + h / 2 * k1, u + h / 2)
        k3 = f(y + h / 2 * k2, u + h / 2)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(y + h * k3, u + h)), None

    return jax.lax.scan(step, y, jnp.arange(steps))[0]


@contextlib.contextmanager
def operation_by_operation():
    """The control flow of `jax.lax` in Python, so that what is called outside jit compiles no loop: much faster for tiny runs."""
    real = jax.lax.cond, jax.lax.fori_loop

    def scan(body, carry, xs):
        ys = []
        for i in range(len(jax.tree.leaves(xs)[0])):
            carry, y = body(carry, jax.tree.map(lambda a: a[i], xs))
            ys.append(y)
        return carry, None if ys[0] is None else jnp.stack(ys)

    def cond(predicate, true, false, *operands):
        if isinstance(predicate, jax.core.Tracer):
            return real[0](predicate, true, false, *operands)
        return (true if predicate else false)(*operands)

    def fori_loop(low, high, body, value):
        if isinstance(high, jax.core.Tracer):
            return real[1](low, high, body, value)
        for i in range(low, int(high)):
            value = body(i, value)
        return value

    with mock.patch.multiple(jax.lax, scan=scan, cond=cond, fori_loop=fori_loop):
        yield
