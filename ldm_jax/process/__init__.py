"""The mathematics between network and picture, as pure functions: depends on jax alone."""
from ldm_jax.process.adversarial import ADVERSARIAL
from ldm_jax.process.distillation import DISTILLATIONS, dds_gradient, sds_gradient, surrogate_loss, vsd_gradient
from ldm_jax.process.editing import encode, inpaint, sdedit, slerp, translate
from ldm_jax.process.few_step import FEW_STEP
from ldm_jax.process.grids import GRIDS
from ldm_jax.process.guidance import GUIDANCE
from ldm_jax.process.likelihood import bits_per_dim, dequantize, ode_logp, vlb_bpd, vlb_limit_bpd
from ldm_jax.process.losses import TIMES, WEIGHTS, diffusion_loss
from ldm_jax.process.parameterizations import PARAMETERIZATIONS, convert, denoiser
from ldm_jax.process.samplers import SAMPLERS, Sampler, prior, sample
from ldm_jax.process.schedules import SCHEDULES, Schedule

__all__ = ["ADVERSARIAL", "DISTILLATIONS", "FEW_STEP", "GRIDS", "GUIDANCE", "PARAMETERIZATIONS", "SAMPLERS", "SCHEDULES", "TIMES",
           "WEIGHTS", "Sampler", "Schedule", "bits_per_dim", "convert", "dds_gradient", "denoiser", "dequantize", "diffusion_loss",
           "encode", "inpaint", "ode_logp", "prior", "sample", "sdedit", "sds_gradient", "slerp", "surrogate_loss",
           "translate", "vlb_bpd", "vlb_limit_bpd", "vsd_gradient"]
