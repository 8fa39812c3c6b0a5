"""What a network is asked to predict, and how its answer becomes x0.

With x_t = alpha x0 + sigma eps, any of these fixes the two others:

    eps    the noise                                                    Ho et al. 2020, eq. 12
    x0     the data
    v      alpha eps - sigma x0                                         Salimans & Ho 2022, section 4
    flow   eps - x0, the velocity of the straight path to the noise     Liu et al. 2022, eq. 1 (time reversed)
    score  grad log p(x_t) = -eps / sigma                               Song et al. 2021

`gain` is |d eps / d output|: a squared error of the output times gain^2 is a squared error of eps, which is how the
weights of `losses.py` mean the same for every target.
"""
import dataclasses
from typing import Callable

from ldm_jax.process.schedules import Schedule
from ldm_jax.types import Array, Denoise, UserError, expand, lookup


@dataclasses.dataclass(frozen=True)
class Parameterization:
    """One prediction target; alpha and sigma broadcast against the images.

    Attributes:
      target: (x0, eps, alpha, sigma) -> what the network should output.
      x0: (output, x_t, alpha, sigma) -> the data it implies.
      gain: (alpha, sigma) -> |d eps / d output|.
    """
    target: Callable[[Array, Array, Array, Array], Array]
    x0: Callable[[Array, Array, Array, Array], Array]
    gain: Callable[[Array, Array], Array]


PARAMETERIZATIONS = {
    "eps": Parameterization(
        target=lambda x0, eps, alpha, sigma: eps,
        x0=lambda eps, x_t, alpha, sigma: (x_t - sigma * eps) / alpha,
        gain=lambda alpha, sigma: 1.0),
    "x0": Parameterization(
        target=lambda x0, eps, alpha, sigma: x0,
        x0=lambda x0, x_t, alpha, sigma: x0,
        gain=lambda alpha, sigma: alpha / sigma),
    "v": Parameterization(
        target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
        x0=lambda v, x_t, alpha, sigma: (alpha * x_t - sigma * v) / (alpha**2 + sigma**2),
        gain=lambda alpha, sigma: alpha / (alpha**2 + sigma**2)),
    "flow": Parameterization(
        target=lambda x0, eps, alpha, sigma: eps - x0,
        x0=lambda u, x_t, alpha, sigma: (x_t - sigma * u) / (alpha + sigma),
        gain=lambda alpha, sigma: alpha / (alpha + sigma)),
    "score": Parameterization(
        target=lambda x0, eps, alpha, sigma: -eps / sigma,
        x0=lambda score, x_t, alpha, sigma: (x_t + sigma**2 * score) / alpha,
        gain=lambda alpha, sigma: sigma),
}


def eps_of_x0(x0: Array, x_t: Array, alpha: Array, sigma: Array) -> Array:
    """eps = (x_t - alpha x0) / sigma."""
    return (x_t - alpha * x0) / sigma


def check_parameterization(name: str, schedule: Schedule) -> Parameterization:
    """The row `name` of PARAMETERIZATIONS.

    Raises:
      UserError: for an unknown name, and for a target that leaves x0 undetermined at t = 1 under this schedule.
    """
    row = lookup(PARAMETERIZATIONS, name, "parameterization")
    if name in ("eps", "score") and schedule.zero_terminal_snr:
        raise UserError(f"parameterization {name!r} cannot be used with schedule {schedule.name!r}: alpha(1) = 0, so at t = 1 "
                        f"the noise says nothing about x0; use 'v', 'x0' or 'flow', or a schedule with alpha(1) > 0")
    return row


def denoiser(predict: Callable[[Array, Array], Array], schedule: Schedule, parameterization: str) -> Denoise:
    """denoise(x_t [B, ...], t [B]) -> x0 from a network's raw output predict(x_t, t)."""
    row = check_parameterization(parameterization, schedule)

    def denoise(x_t, t):
        return row.x0(predict(x_t, t), x_t, expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t))

    return denoise
