"""The mathematics between network and picture, as pure functions: depends on jax alone."""
from ldm_jax.process.grids import GRIDS
from ldm_jax.process.guidance import GUIDANCE
from ldm_jax.process.losses import TIMES, WEIGHTS, diffusion_loss
from ldm_jax.process.parameterizations import PARAMETERIZATIONS, denoiser
from ldm_jax.process.samplers import SAMPLERS, Sampler, prior, sample
from ldm_jax.process.schedules import SCHEDULES, Schedule

__all__ = ["GRIDS", "GUIDANCE", "PARAMETERIZATIONS", "SAMPLERS", "SCHEDULES", "TIMES", "WEIGHTS", "Sampler", "Schedule",
           "denoiser", "diffusion_loss", "prior", "sample"]
