"""The reverse of `schedulers`: the scheduler_config.json of a process of ours and of the method it is sampled with."""
from typing import Any, Dict, Mapping, Optional, Tuple

import numpy as np

from ldm_jax.types import UserError
from ldm_jax.weights.schedulers import TARGETS

SPACINGS = {"uniform": "trailing", "trailing": "trailing", "leading": "leading", "linspace": "linspace"}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}


def ddim(options: Mapping[str, Any]) -> Dict[str, Any]:
    bound = options.get("bound")
    return dict(_class_name="DDIMScheduler", clip_sample=bound is not None, clip_sample_range=1.0 if bound is None else bound)


def ddpm(options: Mapping[str, Any]) -> Dict[str, Any]:
    return dict(_class_name="DDPMScheduler", clip_sample=False, variance_type=VARIANCES[options.get("variance", "small")])


def dpmpp_2m(options: Mapping[str, Any]) -> Dict[str, Any]:
    return dict(_class_name="DPMSolverMultistepScheduler", solver_type=options.get("solver", "midpoint"))


METHODS = {"ddim": ddim, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m}  # a row of SAMPLERS -> its options -> a scheduler's own entries


def vp_config(abar: np.ndarray, target: str, sampler: str, options: Mapping[str, Any], grid: Any,
              learned_variance: bool) -> Tuple[Dict[str, Any], Optional[str]]:
    """(the config of a scheduler, what of the method it does not say, or None) for a variance-preserving process.

    Args:
      abar: [T], alpha^2 at the times (k + 1) / T, written as the table of betas 1 - abar_k / abar_{k - 1}.
      target: a row of PARAMETERIZATIONS. sampler, options: a row of SAMPLERS and its options. grid: a row of GRIDS, or a function.

    Raises:
      UserError: for a target that no scheduler has.
    """
    targets = {ours: theirs for theirs, ours in TARGETS.items()}
    if target not in targets:
        raise UserError(f"a model that predicts {target!r} cannot be exported; schedulers know: {', '.join(targets)}")
    betas, lost = 1 - abar / np.concatenate([[1.0], abar[:-1]]), []
    if not np.all((betas > 0) & (betas < 1)):
        raise UserError(f"a process with betas from {betas.min():g} to {betas.max():g} cannot be exported; they must be in (0, 1)")
    if sampler not in METHODS:
        lost.append(f"the sampler {sampler!r} has no scheduler: DDIM stands in its place")
    if not isinstance(grid, str) or grid not in SPACINGS:
        lost.append(f"the grid {grid if isinstance(grid, str) else 'given as a function'!r} has no scheduler: evenly spaced steps do")
    method = METHODS.get(sampler, ddim)(options if sampler in METHODS else {})
    if learned_variance and method["_class_name"] == "DDPMScheduler":
        method["variance_type"] = "learned_range"
    spacing = SPACINGS.get(grid, "trailing") if isinstance(grid, str) else "trailing"
    return {**method, "num_train_timesteps": len(abar), "trained_betas": betas.tolist(), "prediction_type": targets[target],
            "timestep_spacing": spacing, "steps_offset": 0, "beta_schedule": "linear"}, "; ".join(lost) or None


def flow_config(target: str, sampler: str, grid: Any) -> Tuple[Dict[str, Any], Optional[str]]:
    """The same for rectified flow, of which there is Euler's method alone.

    Raises:
      UserError: for another target than "flow".
    """
    if target != "flow":
        raise UserError(f"a model of rectified flow that predicts {target!r} cannot be exported; schedulers know 'flow' alone")
    lost = [] if sampler in ("euler", "ddim") else [f"the sampler {sampler!r} has no scheduler: Euler's method stands in its place"]
    lost.append("the last of evenly spaced steps is taken at t = 1/1000")
    return dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=1.0), "; ".join(lost)
