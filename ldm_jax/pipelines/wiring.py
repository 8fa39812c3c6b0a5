"""A published net, its scheduler, its first stage and its conditions, made one Pipeline."""
import dataclasses
import functools
from typing import Any, Callable, Mapping, Optional, Tuple

import jax.numpy as jnp

from ldm_jax import process
from ldm_jax.models.net import Net
from ldm_jax.models.unet import UNet
from ldm_jax.process import tabled, thresholding
from ldm_jax.process.samplers import grid_times
from ldm_jax.sampling import Pipeline
from ldm_jax.systems import System
from ldm_jax.systems.base import Codec, diffusion
from ldm_jax.systems.conditions import Conditioner, Space
from ldm_jax.systems.latent import latent
from ldm_jax.types import Array, PyTree, UserError, fold_in
from ldm_jax.weights.schedulers import Sampling


@dataclasses.dataclass(frozen=True)
class Stepped(Net):
    """A Net that is told its scheduler's step k = t T - 1: "round", "floor", or "exact" for what lies between too; times `unit`."""
    rounding: str = "round"
    unit: float = 1.0

    def module_time(self, t: Array) -> Array:
        k = jnp.asarray(t, jnp.float32) * self.timesteps - 1.0
        return self.unit * {"round": jnp.round, "floor": lambda k: jnp.floor(k + 1e-3), "exact": lambda k: k}[self.rounding](k)


@dataclasses.dataclass(frozen=True)
class Levelled(Net):
    """A Net that is told the noise level low (high / low)^u, u = least + (1 - least) t."""
    sigmas: Tuple[float, float] = (0.01, 1.0)
    least: float = 0.0

    def module_time(self, t: Array) -> Array:
        low, high = self.sigmas
        return low * (high / low) ** (self.least + (1.0 - self.least) * jnp.asarray(t, jnp.float32))


def schedule_and_grid(sampling: Sampling) -> Tuple[process.Schedule, Callable]:
    """The process of a published scheduler and the times that it visits, a function like the rows of GRIDS."""
    if sampling.spacing == "flow":
        grid = functools.partial(tabled.flow_grid, timesteps=sampling.steps, shift=sampling.shift)
        return process.SCHEDULES["rectified_flow"](), grid
    if sampling.spacing == "levels":
        low, high = sampling.sigmas
        return process.SCHEDULES["ve"](low, high), functools.partial(process.GRIDS["exponential"], sigma_min=low, sigma_max=high)
    options = {"trailing": {}, "leading": dict(offset=sampling.offset, endpoint=sampling.endpoint),
               "linspace": dict(endpoint=sampling.endpoint, rounded=sampling.rounded)}[sampling.spacing]
    grid = functools.partial(tabled.published_grid, spacing=sampling.spacing, levels=sampling.levels, last=sampling.last,
                             whole_table=sampling.whole_table, **options)
    return tabled.from_ratios(sampling.abar, sampling.log_between), grid


def told(net: Net, sampling: Sampling) -> Net:
    """The net with the time that its scheduler tells it."""
    fields = {f.name: getattr(net, f.name) for f in dataclasses.fields(Net)}
    if sampling.spacing == "flow":
        return Net(**{**fields, "timesteps": None, "time_scale": float(sampling.steps)})
    if sampling.spacing == "levels":
        return Levelled(**{**fields, "timesteps": None}, sigmas=sampling.sigmas, least=sampling.least_time)
    if net.timesteps is None:
        raise UserError("the net takes a noise level for its time and its scheduler has integer steps; they do not fit together")
    return Stepped(**{**fields, "timesteps": sampling.steps}, rounding=sampling.time, unit=sampling.unit)


def published(system: System, schedule: process.Schedule, own_grid: Callable, sampling: Sampling) -> System:
    """`system`, started from the noise and with the limits on x0 that the scheduler has, whatever sampler is chosen.

    The scheduler's own sampler on its own grid also goes by its strides.
    """
    def limited(denoise):
        if sampling.threshold is not None:
            quantile, maximum = sampling.threshold
            return thresholding.dynamic_threshold(denoise, quantile=quantile, maximum=maximum)
        return denoise if sampling.clip is None else thresholding.static_clip(denoise, sampling.clip)

    def sample(params, x, keys, cond, *, sampler, steps, capacity, grid="uniform", **options):
        start = schedule.sigma(grid_times(grid, schedule, steps, capacity)[0]) if sampling.scaled_start else 1.0
        end, strided = (sampling.last + 1) / sampling.steps, sampling.strided and grid is own_grid and sampler.name == sampling.sampler

        def step(denoise, process, x, t, s, key, carry):
            if strided:
                s = t - sampling.steps // steps / sampling.steps
                s = jnp.where(s * sampling.steps > 0.5, s, end)
            return sampler.step(limited(denoise), process, x, t, s, key, carry)

        method = sampler._replace(step=step)
        return system.sample(params, x, keys, cond, sampler=method, steps=steps, capacity=capacity, grid=grid, start=start, **options)

    return dataclasses.replace(system, sample=sample)


def resized(net: Net, size: Tuple[int, int], factor: int) -> Net:
    """The U-Net for pictures of size (H, W), `factor` times that of x_t. Its parameters are the same.

    Raises:
      UserError: for a size that its levels do not divide, and for a transformer, whose positions have one size.
    """
    if tuple(size) == tuple(n * factor for n in net.image_shape[:2]):
        return net
    if not isinstance(net.module, UNet):
        raise UserError(f"size={size}: a transformer makes pictures of the size that it was trained on; leave it out")
    unit = factor * 2 ** (len(net.module.down) - 1)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 and n % unit == 0 for n in size):
        raise UserError(f"size={size} must be (height, width), multiples of {unit} for this model")
    return dataclasses.replace(net, image_shape=(*(n // factor for n in size), net.image_shape[-1]))


def dropped(conditioners: Mapping[str, Conditioner], drops: Mapping[str, float]) -> Mapping[str, Conditioner]:
    """The conditioners, dropped in training at the rates `drops`, by name, in place of their own.

    Raises:
      UserError: for a conditioner that the model has not, and for dropping the class of a model that has no null class.
    """
    for name, rate in drops.items():
        if name not in conditioners:
            raise UserError(f"this model has no condition {name!r}; it takes: {', '.join(conditioners) or 'none'}")
        if rate and not conditioners[name].drop and name == "class":
            raise UserError(f"drop={rate} of the class needs a null class, which this model has not; set it to 0")
    return {name: dataclasses.replace(c, drop=drops.get(name, c.drop)) for name, c in conditioners.items()}


def wired(sampling: Sampling, net: Net, params: PyTree, autoencoder: Optional[Tuple[Any, PyTree]], conditioners: Callable, *,
          steps: int, guidance: float = 1.0, others: Mapping[str, Tuple[Any, PyTree]] = {},
          class_names: Tuple[str, ...] = (), size: Optional[Tuple[int, int]] = None, codec: Codec = Codec()) -> Pipeline:
    """The Pipeline of a net, with the latents of `autoencoder` where there is one.

    conditioners: Space -> name -> conditioner. others: what they use, name -> (net, parameters). size: (H, W) of the pictures, by
    default those of the net. codec: pictures to x0 and back, where there is no autoencoder.

    Raises:
      UserError: for a net and a scheduler that do not fit together, and a size that the net cannot make.
    """
    net = net if size is None else resized(net, size, autoencoder[0].factor if autoencoder else 1)
    training = dict(sampling.training)
    drops, own = training.pop("drops", {}), "schedule" in training
    schedule, grid = schedule_and_grid(sampling)
    net, C = told(net, dataclasses.replace(sampling, time="exact") if own else sampling), net.image_shape[-1]
    if net.out_channels not in (C, 2 * C):
        raise UserError(f"the net gives {net.out_channels} channels for x_t of {C}; it must be as many, or twice that where it "
                        f"learns a variance")
    learned = net.out_channels == 2 * C
    if sampling.options.get("variance") == "learned" and not learned:
        raise UserError("the scheduler has variance_type='learned_range' and the net gives no variance")
    if training.pop("learned_variance", learned) != learned:
        raise UserError(f"the net {'learns a' if learned else 'gives no'} variance; set process.learned_variance={learned}")
    options = {**dict(schedule=schedule, parameterization=sampling.target, learned_variance=learned), **training}
    given, conditioners = conditioners, lambda space: dropped(given(space), drops)
    weights = {"net": params, **{name: p for name, (_, p) in others.items()}}
    if autoencoder is None:
        space = Space(net.image_shape, net.image_shape)
        system = diffusion(net, image_shape=net.image_shape, conditioners=conditioners(space), codec=codec, **options)
    else:
        coder, weights["autoencoder"] = autoencoder
        h, w, c = net.image_shape
        shape = (h * coder.factor, w * coder.factor, coder.image_shape[-1])
        coder = dataclasses.replace(coder, image_shape=shape, latent_shape=(h, w, coder.latent_shape[-1]))
        system = latent(net, coder, image_shape=shape, conditioners=conditioners(Space(shape, net.image_shape)), **options)
        scale, shift = (jnp.broadcast_to(jnp.asarray(a, jnp.float32), (c,)) for a in (coder.scale, coder.shift))
        weights["latent"] = {"shift": shift, "scale": 1.0 / scale}
    system = system if own else published(system, schedule, grid, sampling)
    nets = {name: n for name, (n, _) in others.items()}
    system = dataclasses.replace(system, nets={**system.nets, **nets}, init=lambda key, init=system.init: {
        **init(key), **{name: n.init(fold_in(key, 2 + i)) for i, (name, n) in enumerate(nets.items())}})
    defaults = {"name": sampling.sampler, "steps": min(steps, sampling.steps), "grid": grid, "guidance": guidance,
                "batch_size": 8, sampling.sampler: dict(sampling.options)}
    return Pipeline(system, weights, defaults, class_names)
