"""Averages of any length, after training: power-function averages of the parameters, and what is put together from them.

The average of relative length std weighs theta(tau) by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], so that it grows
with the run; std is the standard deviation of p as a part of t. A run carries a few of them and keeps snapshots; a least-squares
combination of the snapshots' profiles gives any other length (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3 and appendix C).
"""
from typing import Callable, List, Mapping, Optional, Sequence, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.training.checkpoint import Checkpoints, reason_of
from ldm_jax.types import Array, PyTree, UserError

LONGEST = 0.28  # of a profile that still grows with tau: the uniform one has 1 / sqrt(12)
WORST = 0.1  # relative error of a profile, beyond which it is refused
SMALLEST = 1e-5  # of the weights of snapshots that are read


def gamma_of(std: float) -> float:
    """The exponent gamma of the profile of relative standard deviation `std`: the largest root of
    (gamma + 1) = std^2 (gamma + 2)^2 (gamma + 3).

    Raises:
      UserError: unless 0 < std <= LONGEST.
    """
    if not 0.0 < std <= LONGEST:
        raise UserError(f"an average of relative length {std} does not exist; give a length above 0 and up to {LONGEST}, such as 0.05")
    return float(np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2]).real.max())


def names_of(stds: Sequence[float]) -> List[str]:
    """The names, in a run's state, of the averages that it carries; `float` reads the length back.

    Raises:
      UserError: for a length that does not exist, or that is given twice.
    """
    for std in stds:
        gamma_of(std)
    names = [repr(float(std)) for std in stds]
    if len(set(names)) < len(names):
        raise UserError(f"train.averages.stds={tuple(stds)} names a length twice")
    return names


def new_powers(params: PyTree, stds: Sequence[float]) -> Mapping[str, PyTree]:
    """Name -> the average before the first update, float32. Its value does not matter: the first update gives it no weight."""
    return {name: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params) for name in names_of(stds)}


def updated(powers: Mapping[str, PyTree], params: PyTree, step: Array) -> Mapping[str, PyTree]:
    """The averages after update number step + 1, which made `params`: avg + (1 - beta) (theta - avg) with
    beta = (1 - 1/t)^(gamma + 1), t = step + 1, under which theta_i has the weight of p on (i - 1, i] exactly."""
    def advance(name: str, average: PyTree) -> PyTree:
        rate = -jnp.expm1((gamma_of(float(name)) + 1.0) * jnp.log1p(-1.0 / (1.0 + step)))  # 1 - beta; 1 - 1/t has too few digits
        return jax.tree.map(lambda a, p: a + rate.astype(jnp.float32) * (p.astype(jnp.float32) - a), average, params)

    return {name: advance(name, average) for name, average in powers.items()}


def inner(gamma_a: np.ndarray, t_a: np.ndarray, gamma_b: np.ndarray, t_b: np.ndarray) -> np.ndarray:
    """The integral of the product of two profiles over time, float64:
    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (t_1 / t_2)^gamma_2 / t_2, t_1 <= t_2 the two ends."""
    gamma_a, t_a, gamma_b, t_b = (np.asarray(a, np.float64) for a in (gamma_a, t_a, gamma_b, t_b))
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / last * (first / last) ** np.where(t_a > t_b, gamma_a, gamma_b)


def weights(stds: np.ndarray, steps: np.ndarray, std: float, step: int) -> Tuple[np.ndarray, float]:
    """(w, error): the combination of snapshots of the lengths `stds` [n] at `steps` [n] whose profile is nearest, in the mean square, to
    that of length `std` at `step`; error is the root mean square of the difference, relative to the profile.

    sum(w) = 1, so that what has not moved is given back as it is.
    """
    gamma = np.array([gamma_of(s) for s in stds])
    steps, wanted = np.asarray(steps, np.float64), (gamma_of(std), float(step))
    gram = inner(gamma[:, None], steps[:, None], gamma[None], steps[None])
    against, square = inner(gamma, steps, *wanted), float(inner(*wanted, *wanted))
    unit = np.diag(gram) ** -0.5  # profiles of unit norm, for the sake of the condition
    inverse = np.linalg.pinv(gram * unit * unit[:, None], rcond=1e-12, hermitian=True) * unit * unit[:, None]
    w, ones = inverse @ against, inverse @ np.ones_like(against)
    w = w + (1.0 - np.sum(w)) / np.sum(ones) * ones
    return w, float(np.sqrt(max(0.0, square - 2.0 * w @ against + w @ gram @ w) / square))


def _terms(stds: Sequence[float], steps: Sequence[int], std: float, step: int) -> Tuple[List[Tuple[int, float, float]], float]:
    """([(snapshot's step, length, weight)], error), without the snapshots that hardly matter."""
    all_steps, all_stds = (a.ravel() for a in np.meshgrid(steps, stds, indexing="ij"))
    w, _ = weights(all_stds, all_steps, std, step)
    used = np.abs(w) > SMALLEST
    w, error = weights(all_stds[used], all_steps[used], std, step)
    return list(zip(all_steps[used].tolist(), all_stds[used].tolist(), w.tolist())), error


class Snapshots:
    """The snapshots of one run's averages, in a directory of their own; none is ever removed but by `drop_after`.

    Args:
      directory: see `Checkpoints`.
      stds: the lengths that the run carries. With none, nothing is written.
      every: a snapshot is due at each multiple of this many steps, and at the last step, `last`.
    """

    def __init__(self, directory: str, stds: Sequence[float], *, every: int, last: int):
        if stds and every < 1:
            raise UserError(f"train.averages.every={every} must be at least 1")
        self._checkpoints = Checkpoints(directory, keep=None) if stds else None
        self._every, self._last = every, last

    def begin(self, step: int, powers: Mapping[str, PyTree]) -> None:
        """Of a run that goes on from `step`: later snapshots are of another future and go; the one of this step may be missing yet."""
        if self._checkpoints is not None:
            self._checkpoints.drop_after(step)
            if step not in self._checkpoints.steps:
                self.offer(step, powers)

    def offer(self, step: int, powers: Mapping[str, PyTree]) -> None:
        """Start saving, if a snapshot is due at `step`."""
        if self._checkpoints is not None and step and (step % self._every == 0 or step == self._last):
            self._checkpoints.save(step, dict(powers), {})

    def wait(self) -> None:
        """Block until what was offered is on disk. To be called before a later checkpoint is, so that no snapshot is missed."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._checkpoints is not None:
            self._checkpoints.__exit__(kind, error, trace)


def reconstruct(directory: str, like: PyTree, *, stds: Sequence[float], std: float, step: Optional[int] = None,
                warn: Callable[[str], None]) -> Tuple[PyTree, int, float]:
    """(average, step, error): the average of relative length `std` at `step` from the snapshots in `directory`, see `weights`.

    Snapshots are read one by one, verified, and summed in float64; the result has the types of `like`.

    Args:
      like: ShapeDtypeStructs of the parameters.
      stds: the lengths that the run carried.
      step: of a snapshot; the last one's by default.
      warn: is told of damaged snapshots, which are left out.

    Raises:
      UserError: where there are no snapshots, or none at `step`, or too few for this length.
    """
    gamma_of(std)
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), like)
    with Checkpoints(directory, read_only=True) as checkpoints:
        steps = checkpoints.steps
        while True:
            at = steps[-1] if step is None and steps else step
            if at not in steps:
                raise UserError(f"there is no snapshot of step {at} in {directory}; there are: {_listed(steps)}")
            used = [s for s in steps if s <= at]
            terms, error = _terms(stds, used, std, at)
            if error > WORST:
                raise UserError(f"an average of length {std} at step {at} cannot be made of {len(used)} snapshots of lengths "
                                f"{tuple(stds)}: its profile would be off by {error:.0%}, and {WORST:.0%} is allowed. Give a length "
                                f"nearer to those, or train with more snapshots (train.averages.every)")
            total = jax.tree.map(lambda a: np.zeros(a.shape, np.float64), like)
            for where, length, weight in terms:
                name = repr(length)
                try:
                    part = checkpoints.load(where, {name: structs})[0][name]
                except Exception as problem:  # as in Checkpoints.restore
                    warn(f"snapshot {where} in {directory} is damaged ({reason_of(problem)}); going on without it")
                    steps.remove(where)
                    break
                for sum_, a in zip(jax.tree.leaves(total), jax.tree.leaves(part)):
                    np.add(sum_, weight * np.asarray(a, np.float64), out=sum_)
            else:
                return jax.tree.map(lambda sum_, a: jnp.asarray(sum_, a.dtype), total, like), at, error


def _listed(steps: Sequence[int]) -> str:
    return f"{', '.join(map(str, steps[:3]))} ... {', '.join(map(str, steps[-3:]))}" if len(steps) > 6 else str(steps or "none")
