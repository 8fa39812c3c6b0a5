"""A published scheduler_config.json as what this library samples with: a table of alphas, a target, a method and its times.

A scheduler names integer steps k of T; k is the time (k + 1) / T here. The names of spacings are those of `process.grids`.
"""
import dataclasses
import json
import os
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np

from ldm_jax import paths
from ldm_jax.types import UserError, lookup
from ldm_jax.weights.options import options, refuse

TARGETS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
ALMOST_ZERO = 2.0**-24  # abar of the last step at zero SNR, for schedulers that divide by it
NEARLY_ZERO = 1e-14  # and for the others, which have 0 there


@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
    """How a published model is sampled.

    Attributes:
      steps: T.
      target: a row of PARAMETERIZATIONS.
      sampler, options: a row of SAMPLERS and what it is made with.
      abar: [T] float64, alpha^2 of the integer steps; None for rectified flow and for "levels".
      log_between: between the integer steps log(sigma / alpha) is linear in the time, otherwise sigma / alpha is.
      spacing: how the steps are chosen: "leading", "trailing", "linspace", "flow" for rectified flow, or "levels" of noise, in equal
        ratios, of a process with alpha = 1.
      offset, endpoint, rounded: of the spacing, see `process.grids`.
      levels: "karras" or "exponential": noise levels put between the first and the last of the steps instead; None for none.
      whole_table: `levels` lie between the ends of the table instead.
      strided: each step goes down by T // n integer steps, whatever step is asked at next, and below 0 to the end.
      last: the integer step that ends it: -1 for data, or 0.
      time: what integer step the net is told: "round", "floor" or "exact", which need not be whole. unit: times this.
      scaled_start: it starts from noise of the first step's sigma; otherwise from N(0, I) whatever step is first.
      clip: x0 is kept within this; None for not.
      threshold: (quantile, maximum) of dynamic thresholding; None for none.
      shift: of rectified flow.
      training: what a net is trained with on from here, arguments of `systems.base.diffusion`; with a schedule and a parameterization
        among them all of the above gives way to them. "drops": the rates at which conditions are dropped, by name.
      sigmas: (least, largest) of "levels". The net is told sigma itself, that of the time least_time + (1 - least_time) t.
    """
    steps: int
    target: str
    sampler: str
    options: Mapping[str, Any]
    abar: Optional[np.ndarray] = None
    log_between: bool = False
    spacing: str = "leading"
    offset: int = 0
    endpoint: bool = True
    rounded: bool = True
    levels: Optional[str] = None
    whole_table: bool = False
    strided: bool = False
    last: int = -1
    time: str = "round"
    unit: float = 1.0
    scaled_start: bool = False
    clip: Optional[float] = None
    threshold: Optional[Tuple[float, float]] = None
    shift: float = 1.0
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sigmas: Optional[Tuple[float, float]] = None
    least_time: float = 0.0


def read_scheduler(directory: str) -> Sampling:
    """The Sampling of the scheduler_config.json in a directory.

    Raises:
      UserError: for a file that cannot be read, a scheduler that is not known, and options that are not supported.
    """
    path = os.path.join(paths.expand(directory), "scheduler_config.json")
    try:
        config = json.loads(paths.read_text(path))
    except FileNotFoundError:
        raise UserError(f"no file {path!r}; give the directory of a published scheduler, such as CHECKPOINT/scheduler") from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    if not isinstance(config, dict):
        raise UserError(f"cannot read {path}: not a JSON object")
    return sampling(config)


def sampling(config: Mapping[str, Any]) -> Sampling:
    """The Sampling of a scheduler's config.

    Raises:
      UserError: for a scheduler that is not known, and for options that are not supported, all of them by name and value.
    """
    return lookup(SCHEDULERS, config.get("_class_name"), "published scheduler")(config)


BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
         "prediction_type": "epsilon", "steps_offset": 0, "timestep_spacing": "leading"}
THRESHOLDS = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIPS = {"clip_sample": True, "clip_sample_range": 1.0}
LEVELS = {"use_karras_sigmas": False, "use_exponential_sigmas": False}
ONLY = {"beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"), "prediction_type": tuple(TARGETS),
        "timestep_spacing": ("leading", "trailing", "linspace"), "steps_offset": lambda n: isinstance(n, int) and n >= 0}
OFF = (False, None)
NO_BETA_LEVELS = {"use_beta_sigmas": OFF}
NO_FLOW = {"use_flow_sigmas": OFF, "use_dynamic_shifting": OFF}
NO_FLOW_EFFECT = {"flow_shift", "time_shift_type"}  # of noise levels refused above


def _abar(config: Mapping[str, Any], said: Mapping[str, Any], least: float = NEARLY_ZERO) -> np.ndarray:
    """alpha^2 [T] of the integer steps; where the end is moved to zero SNR it is `least`."""
    T, first, last = said["num_train_timesteps"], said["beta_start"], said["beta_end"]
    if said["trained_betas"] is not None:
        betas = np.asarray(said["trained_betas"], np.float64)
    elif said["beta_schedule"] == "linear":
        betas = np.linspace(first, last, T)
    elif said["beta_schedule"] == "scaled_linear":
        betas = np.linspace(first**0.5, last**0.5, T) ** 2
    else:  # Nichol & Dhariwal 2021, eq. 17
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    if betas.shape != (T,) or not np.all((betas > 0) & (betas < 1)):
        refuse(config, [f"betas of shape {betas.shape}, from {betas.min():g} to {betas.max():g}, for {T} steps"])
    abar = np.cumprod(1 - betas)
    if said.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1
        alpha = np.sqrt(abar)
        abar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        abar = np.maximum(abar, least * (1 + 1e-3 * np.arange(T)[::-1]))  # decreasing, to `least`
    return abar


def _common(config: Mapping[str, Any], said: Mapping[str, Any], least: float = NEARLY_ZERO) -> Dict[str, Any]:
    leading = said["timestep_spacing"] == "leading"
    found = dict(steps=said["num_train_timesteps"], target=TARGETS[said["prediction_type"]], abar=_abar(config, said, least),
                 spacing=said["timestep_spacing"], offset=said["steps_offset"] if leading else 0)
    if said.get("thresholding"):
        found["threshold"] = (said["dynamic_thresholding_ratio"], said["sample_max_value"])
    elif said.get("clip_sample"):
        found["clip"] = said["clip_sample_range"]
    if said.get("rescale_betas_zero_snr") and least == NEARLY_ZERO and found["target"] == "eps" and not leading:
        refuse(config, [f"rescale_betas_zero_snr=True with prediction_type='epsilon', timestep_spacing={found['spacing']!r}"])
    return found


def _levels(config: Mapping[str, Any], said: Mapping[str, Any]) -> Dict[str, Any]:
    found = [name for name in ("karras", "exponential") if said[f"use_{name}_sigmas"]]
    if len(found) == 2:
        refuse(config, ["use_karras_sigmas and use_exponential_sigmas together"])
    return dict(levels=found[0], log_between=True) if found else dict(levels=None)


def ddpm(config: Mapping[str, Any]) -> Sampling:
    """DDPMScheduler."""
    variances = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}
    said = options(config, {**BETAS, **THRESHOLDS, **CLIPS, "variance_type": "fixed_small", "rescale_betas_zero_snr": False},
                   {**ONLY, "variance_type": tuple(variances)})
    return Sampling(sampler="ddpm", options={"variance": variances[said["variance_type"]]}, **_common(config, said))


def ddim(config: Mapping[str, Any]) -> Sampling:
    """DDIMScheduler, which clips x0 alone and leaves eps as the net says."""
    said = options(config, {**BETAS, **CLIPS, "set_alpha_to_one": True, "rescale_betas_zero_snr": False},
                   {**ONLY, "thresholding": OFF}, {"dynamic_thresholding_ratio", "sample_max_value"})
    found = _common(config, said)
    bound = found.pop("clip", None)
    return Sampling(sampler="ddim", options={} if bound is None else {"bound": bound}, last=-1 if said["set_alpha_to_one"] else 0,
                    strided=said["timestep_spacing"] != "leading", **found)


def pndm(config: Mapping[str, Any]) -> Sampling:
    """PNDMScheduler. It averages v over several steps as if it were eps, so v is refused."""
    said = options(config, {**BETAS, "skip_prk_steps": False, "set_alpha_to_one": False},
                   {**ONLY, "prediction_type": ("epsilon",)})
    return Sampling(sampler="pndm", options={"start": "heun" if said["skip_prk_steps"] else "runge_kutta"},
                    last=-1 if said["set_alpha_to_one"] else 0, **_common(config, said))


def _in_levels(sampler: str, defaults: Mapping[str, Any] = {}, only: Mapping[str, Any] = {}) -> Callable:
    """The reader of a scheduler that moves x / alpha from one noise level to another; its steps need not be whole."""
    def read(config: Mapping[str, Any]) -> Sampling:
        said = options(config, {**BETAS, "timestep_spacing": "linspace", **defaults}, {**ONLY, **only})
        levels = _levels(config, said) if "use_karras_sigmas" in said else {}
        return Sampling(sampler=sampler, options={}, rounded=False, time="exact",
                        scaled_start=said["timestep_spacing"] != "leading", **{**_common(config, said, ALMOST_ZERO), **levels})

    return read


euler = _in_levels("ddim", {**LEVELS, "rescale_betas_zero_snr": False}, {
    **NO_BETA_LEVELS, "interpolation_type": ("linear",), "sigma_min": (None,), "sigma_max": (None,),
    "timestep_type": ("discrete",), "final_sigmas_type": ("zero",)})
euler_ancestral = _in_levels("euler_ancestral", {"rescale_betas_zero_snr": False})
lms = _in_levels("lms", LEVELS, NO_BETA_LEVELS)
heun = _in_levels("edm", {**LEVELS, **CLIPS, "clip_sample": False, "beta_start": 0.00085, "beta_end": 0.012}, NO_BETA_LEVELS)


def _multistep(config: Mapping[str, Any], said: Mapping[str, Any], order: int) -> Dict[str, Any]:
    """What the two multistep schedulers of whole steps have in common."""
    found = {**_common(config, said, ALMOST_ZERO), **_levels(config, said), "whole_table": True}
    if found["levels"] == "exponential":
        found["time"] = "floor"
    if said["final_sigmas_type"] == "sigma_min":
        found["last"] = 0
        wrong = [f"{key}=True" for key in ("lower_order_final", "euler_at_final") if said.get(key)]
        if order > 1 and wrong:  # the order would depend on the number of steps
            refuse(config, [f"final_sigmas_type='sigma_min' with {', '.join(wrong)}"])
    return found


def dpm_solver(config: Mapping[str, Any]) -> Sampling:
    """DPMSolverMultistepScheduler. Its third order is refused: its second derivative is half of what it should be."""
    said = options(config, {**BETAS, **THRESHOLDS, **LEVELS, "timestep_spacing": "linspace", "solver_order": 2,
                            "solver_type": "midpoint", "algorithm_type": "dpmsolver++", "lower_order_final": True,
                            "euler_at_final": False, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False},
                   {**ONLY, **NO_BETA_LEVELS, **NO_FLOW, "solver_order": (1, 2), "solver_type": ("midpoint", "heun"),
                    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"), "final_sigmas_type": ("zero", "sigma_min"),
                    "use_lu_lambdas": OFF, "lambda_min_clipped": lambda value: value is None or value == -np.inf,
                    "variance_type": (None, "learned", "learned_range")}, NO_FLOW_EFFECT)
    found, noisy = _multistep(config, said, said["solver_order"]), said["algorithm_type"].startswith("sde")
    if said["beta_schedule"] == "squaredcos_cap_v2":
        found["time"] = "floor"
    if said["solver_order"] == 1:
        return Sampling(sampler="ddpm" if noisy else "ddim", options={}, endpoint=False, **found)
    return Sampling(sampler="dpmpp_2m_sde" if noisy else "dpmpp_2m", options={"solver": said["solver_type"]}, endpoint=False,
                    **found)


def unipc(config: Mapping[str, Any]) -> Sampling:
    """UniPCMultistepScheduler."""
    said = options(config, {**BETAS, **THRESHOLDS, **LEVELS, "timestep_spacing": "linspace", "solver_order": 2,
                            "lower_order_final": True, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False},
                   {**ONLY, **NO_BETA_LEVELS, **NO_FLOW, "solver_order": (1, 2), "solver_type": ("bh2",), "predict_x0": (True,),
                    "disable_corrector": ((),), "solver_p": (None,), "final_sigmas_type": ("zero", "sigma_min"),
                    "sigma_min": (None,), "sigma_max": (None,), "shift_terminal": (None,)}, NO_FLOW_EFFECT)
    found = _multistep(config, said, said["solver_order"])
    return Sampling(sampler="unipc", options={"order": said["solver_order"], "variant": "bh2"}, endpoint=False, **found)


def flow_euler(config: Mapping[str, Any]) -> Sampling:
    """FlowMatchEulerDiscreteScheduler: Euler's method on rectified flow, which the net is told T t of."""
    said = options(config, {"num_train_timesteps": 1000, "shift": 1.0},
                   {"use_dynamic_shifting": OFF, "invert_sigmas": OFF, "shift_terminal": OFF, "use_karras_sigmas": OFF,
                    "use_exponential_sigmas": OFF, **NO_BETA_LEVELS, "stochastic_sampling": OFF, "shift": lambda s: s > 0},
                   {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"})
    return Sampling(steps=said["num_train_timesteps"], target="flow", sampler="euler", options={}, spacing="flow",
                    shift=said["shift"], time="exact")


def score_sde_ve(config: Mapping[str, Any]) -> Sampling:
    """ScoreSdeVeScheduler: at each noise level Langevin's corrector and then a step of reverse diffusion (Song et al. 2021).

    Its corrector takes the norms of the noise and of the score as means over a batch; here each example has its own, so that a
    picture does not depend on the others. They are the same for a batch of one.
    """
    said = options(config, {"num_train_timesteps": 2000, "snr": 0.15, "sigma_min": 0.01, "sigma_max": 1348.0, "sampling_eps": 1e-5,
                            "correct_steps": 1},
                   {"num_train_timesteps": lambda n: n >= 1, "snr": lambda r: r > 0, "sampling_eps": lambda t: 0 <= t < 1,
                    "correct_steps": lambda n: isinstance(n, int) and n >= 0})
    low, high, least = said["sigma_min"], said["sigma_max"], said["sampling_eps"]
    if not 0 < low < high:
        refuse(config, [f"sigma_min={low!r} with sigma_max={high!r}"])
    if least * said["num_train_timesteps"] > 1:  # it would leave out noise levels
        refuse(config, [f"sampling_eps={least!r}, more than one of num_train_timesteps={said['num_train_timesteps']!r} steps"])
    return Sampling(steps=said["num_train_timesteps"], target="score", sampler="predictor_corrector",
                    options={"predictor": "ddpm_large", "snr": said["snr"], "repeats": said["correct_steps"],
                             "first": "corrector", "norms": "drawn"},
                    spacing="levels", scaled_start=True, sigmas=(low, high), least_time=least)


# a scheduler's class -> its config -> Sampling
SCHEDULERS = {"DDPMScheduler": ddpm, "DDIMScheduler": ddim, "PNDMScheduler": pndm, "LMSDiscreteScheduler": lms,
              "EulerDiscreteScheduler": euler, "EulerAncestralDiscreteScheduler": euler_ancestral, "HeunDiscreteScheduler": heun,
              "DPMSolverMultistepScheduler": dpm_solver, "UniPCMultistepScheduler": unipc,
              "ScoreSdeVeScheduler": score_sde_ve, "FlowMatchEulerDiscreteScheduler": flow_euler}
