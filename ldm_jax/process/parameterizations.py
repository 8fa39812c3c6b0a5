"""What a network is asked to predict, and how its answer becomes x0.

With x_t = alpha x0 + sigma eps, any of these fixes all others:

    eps    the noise                                                    Ho et al. 2020, eq. 12
    x0     the data
    v      alpha eps - sigma x0                                         Salimans & Ho 2022, section 4
    flow   eps - x0, the velocity of the straight path to the noise     Liu et al. 2022, eq. 1 (time reversed)
    score  grad log p(x_t) = -eps / sigma                               Song et al. 2021
    edm    (sigma x0 - alpha d^2 eps) / (d sqrt(sigma^2 + alpha^2 d^2)), d = sigma_data     Karras et al. 2022, table 1

A squared error of the output times (alpha slope)^2 is a squared error of eps, times (sigma slope)^2 one of x0, which is how the
weights of `weights.py` mean the same for every target.
"""
import dataclasses
from typing import Callable, NamedTuple, Union

import jax.numpy as jnp

from ldm_jax.process.schedules import Schedule
from ldm_jax.types import Array, Denoise, UserError, expand, lookup


@dataclasses.dataclass(frozen=True)
class Parameterization:
    """One prediction target; alpha and sigma broadcast against the images.

    Attributes:
      target: (x0, eps, alpha, sigma) -> what the network should output.
      x0: (output, x_t, alpha, sigma) -> the data it implies.
      eps: (output, x_t, alpha, sigma) -> the noise it implies.
      slope: (alpha, sigma) -> |d eps / d output| / alpha = |d x0 / d output| / sigma, at given x_t.
      needs_signal: whether the output leaves x0 undetermined where alpha = 0.
    """
    target: Callable[[Array, Array, Array, Array], Array]
    x0: Callable[[Array, Array, Array, Array], Array]
    eps: Callable[[Array, Array, Array, Array], Array]
    slope: Callable[[Array, Array], Array]
    needs_signal: bool = False


def eps_of_x0(x0: Array, x_t: Array, alpha: Array, sigma: Array) -> Array:
    """eps = (x_t - alpha x0) / sigma."""
    return (x_t - alpha * x0) / sigma


class Preconditioning(NamedTuple):
    """x0 = c_skip x_t + c_out F(c_in x_t, c_noise) for a raw network F."""
    c_skip: Array
    c_out: Array
    c_in: Array
    c_noise: Array


def preconditioning(alpha: Array, sigma: Array, sigma_data: float = 0.5) -> Preconditioning:
    """The four scalars of Karras et al. 2022, table 1, for x_t = alpha x0 + sigma eps; theirs is alpha = 1.

    F sees input and target of unit variance for data of standard deviation `sigma_data`. c_noise = log(sigma / alpha) / 4, held
    within [-5, 5] so that it is finite at the ends.
    """
    variance = sigma**2 + (alpha * sigma_data) ** 2
    return Preconditioning(c_skip=alpha * sigma_data**2 / variance, c_out=sigma * sigma_data / jnp.sqrt(variance),
                           c_in=1 / jnp.sqrt(variance), c_noise=jnp.clip(0.25 * (jnp.log(sigma) - jnp.log(alpha)), -5.0, 5.0))


def edm(sigma_data: float = 0.5) -> Parameterization:
    """The target of a network preconditioned as in Karras et al. 2022, eq. 8; feed it through `preconditioned`.

    With sigma_data = 1 on a variance-preserving schedule it is -v. The unit weight on it is the paper's lambda(sigma) on x0.
    """
    if not sigma_data > 0:
        raise UserError(f"sigma_data, the standard deviation of the data, must be positive; got {sigma_data!r}")
    d = sigma_data

    def root(alpha, sigma):
        return jnp.sqrt(sigma**2 + (alpha * d) ** 2)

    def x0(F, x_t, alpha, sigma):
        c = preconditioning(alpha, sigma, d)
        return c.c_skip * x_t + c.c_out * F

    return Parameterization(
        target=lambda x0, eps, alpha, sigma: (sigma * x0 - alpha * d**2 * eps) / (d * root(alpha, sigma)),
        x0=x0,
        eps=lambda F, x_t, alpha, sigma: (sigma * x_t / root(alpha, sigma) - alpha * d * F) / root(alpha, sigma),
        slope=lambda alpha, sigma: d / root(alpha, sigma))


PARAMETERIZATIONS = {
    "eps": Parameterization(
        target=lambda x0, eps, alpha, sigma: eps,
        x0=lambda eps, x_t, alpha, sigma: (x_t - sigma * eps) / alpha,
        eps=lambda eps, x_t, alpha, sigma: eps,
        slope=lambda alpha, sigma: 1 / alpha,
        needs_signal=True),
    "x0": Parameterization(
        target=lambda x0, eps, alpha, sigma: x0,
        x0=lambda x0, x_t, alpha, sigma: x0,
        eps=eps_of_x0,
        slope=lambda alpha, sigma: 1 / sigma),
    "v": Parameterization(
        target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
        x0=lambda v, x_t, alpha, sigma: (alpha * x_t - sigma * v) / (alpha**2 + sigma**2),
        eps=lambda v, x_t, alpha, sigma: (sigma * x_t + alpha * v) / (alpha**2 + sigma**2),
        slope=lambda alpha, sigma: 1 / (alpha**2 + sigma**2)),
    "flow": Parameterization(
        target=lambda x0, eps, alpha, sigma: eps - x0,
        x0=lambda u, x_t, alpha, sigma: (x_t - sigma * u) / (alpha + sigma),
        eps=lambda u, x_t, alpha, sigma: (x_t + alpha * u) / (alpha + sigma),
        slope=lambda alpha, sigma: 1 / (alpha + sigma)),
    "score": Parameterization(
        target=lambda x0, eps, alpha, sigma: -eps / sigma,
        x0=lambda score, x_t, alpha, sigma: (x_t + sigma**2 * score) / alpha,
        eps=lambda score, x_t, alpha, sigma: -sigma * score,
        slope=lambda alpha, sigma: sigma / alpha,
        needs_signal=True),
    "edm": edm(),
}


def check_parameterization(parameterization: Union[str, Parameterization], schedule: Schedule) -> Parameterization:
    """The row of PARAMETERIZATIONS of that name; a Parameterization, such as edm(sigma_data=1.2), is returned as it is.

    Raises:
      UserError: for an unknown name, and for a target that leaves x0 undetermined at t = 1 under this schedule.
    """
    named = isinstance(parameterization, str)
    row = lookup(PARAMETERIZATIONS, parameterization, "parameterization") if named else parameterization
    if row.needs_signal and schedule.zero_terminal_snr:
        name = repr(parameterization) if named else "of eps or the score"
        raise UserError(f"parameterization {name} cannot be used with schedule {schedule.name!r}: alpha(1) = 0, so at t = 1 "
                        f"the noise says nothing about x0; use 'v', 'x0' or 'flow', or a schedule with alpha(1) > 0")
    return row


def convert(output: Array, x_t: Array, t: Array, schedule: Schedule, source: Union[str, Parameterization],
            target: Union[str, Parameterization]) -> Array:
    """An output of one parameterization as another's, at given x_t: output, x_t [B, ...], t [B].

    Where the target diverges (the score, or eps from x0, at sigma = 0) so does the result.
    """
    given = check_parameterization(source, schedule)
    wanted = lookup(PARAMETERIZATIONS, target, "parameterization") if isinstance(target, str) else target
    alpha, sigma = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
    return wanted.target(given.x0(output, x_t, alpha, sigma), given.eps(output, x_t, alpha, sigma), alpha, sigma)


def preconditioned(net: Callable[[Array, Array], Array], schedule: Schedule,
                   sigma_data: float = 0.5) -> Callable[[Array, Array], Array]:
    """predict(x_t, t) = net(c_in x_t, c_noise), c_noise [B], whose parameterization is edm(sigma_data), under any schedule.

    Karras et al. 2022, eq. 7:  denoiser(preconditioned(net, schedule, d), schedule, edm(d)).
    """
    def predict(x_t, t):
        c = preconditioning(schedule.alpha(t), schedule.sigma(t), sigma_data)
        return net(expand(c.c_in, x_t) * x_t, jnp.broadcast_to(c.c_noise, x_t.shape[:1]))

    return predict


def split_variance(output: Array) -> tuple:
    """(prediction, frac), each [..., C], from an output [..., 2 C] whose second half is 2 frac - 1.

    (Nichol & Dhariwal 2021, section 3.1.)

    Raises:
      UserError: for an odd number of channels.
    """
    if output.shape[-1] % 2:
        raise UserError(f"a network with learned variance must output twice the data's channels; got {output.shape[-1]}")
    prediction, signed = jnp.split(output, 2, axis=-1)
    return prediction, 0.5 * (signed + 1)


def denoiser(predict: Callable[[Array, Array], Array], schedule: Schedule, parameterization: Union[str, Parameterization], *,
             learned_variance: bool = False) -> Denoise:
    """denoise(x_t [B, ...], t [B]) -> x0 from a network's raw output predict(x_t, t).

    learned_variance: the output has twice the channels and the answer is (x0, frac), see `split_variance`.
    """
    row = check_parameterization(parameterization, schedule)

    def denoise(x_t, t):
        output, frac = split_variance(predict(x_t, t)) if learned_variance else (predict(x_t, t), None)
        x0 = row.x0(output, x_t, expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t))
        return (x0, frac) if learned_variance else x0

    return denoise
