"""What a run would take, before it takes anything: its config, its mesh, and the compiled update's memory, messages and operations."""
import json
import os
from typing import Any, Dict, List, Mapping, Optional

import jax
import jax.numpy as jnp

from ldm_jax import recipe
from ldm_jax.parallel import cost
from ldm_jax.parallel.sharding import batch_sharding, replicated
from ldm_jax.parallel.signals import asking
from ldm_jax.training.loop import compiled_step, placed_state, train_step
from ldm_jax.training.state import new_state
from ldm_jax.types import UserError

GB = 1e9


def plan(config: Mapping[str, Any], *, memory_gb: Optional[float] = None) -> str:
    """A report on training `config` on the devices that JAX has, one part for each stage that the run would train.

    memory_gb: of one device; by default what the device says it has, or this machine's memory shared among the devices.

    Raises:
      UserError: at the end of a report on a run that would not fit; the message holds it.
    """
    stages = {"": config}
    if "first_stage" in config and not (config.get("first_stage_dir") or config.get("init_dir") or config.get("init_from")):
        stages = {"first stage": config["first_stage"], "second stage": config}
    limit = memory_gb * GB if memory_gb else _memory_of(jax.local_devices()[0])
    lines, short = [json.dumps(config, indent=2, sort_keys=True)], []
    for name, stage in stages.items():
        figures = figures_of(stage)
        total = figures["bytes"]["in all"]
        lines += ["", name or "the run", *table(figures)]
        lines.append(f"  fits: {_size(total)} of {_size(limit)} on each device" if total <= limit else
                     f"  DOES NOT FIT: {_size(total)} of {_size(limit)} on each device")
        if total > limit:
            short.append(f"{name or 'the run'} needs {_size(total)} on each device, which has {_size(limit)}")
    report = "\n".join(lines)
    if short:
        raise UserError(f"{report}\n{'; '.join(short)}. Raise mesh.fsdp or train.accumulate, lower train.batch_size, or set the "
                        f"net's remat")
    return report


def figures_of(config: Mapping[str, Any]) -> Dict[str, Any]:
    """The compiled update of one stage in numbers: parameters, bytes per device, collectives per step, operations per image."""
    system, (mesh, rules) = recipe.build_system(config), recipe.build_mesh(config["mesh"])
    tx, section = recipe.build_optimizer(config, system.trained), config["train"]
    size = section["batch_size"]
    abstract = placed_state(lambda: new_state(system.init(jax.random.key(0)), system.trained, tx, section["averages"]["stds"]), mesh, rules)
    batch = {name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=batch_sharding(mesh, (size, *shape)))
             for name, (shape, dtype) in recipe.batch_fields(config, system).items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    step = train_step(system.loss_fn, tx, ema_decay=section["ema_decay"], accumulate=section["accumulate"], refresh=system.refresh)
    good = jax.ShapeDtypeStruct((), bool, sharding=replicated(mesh))
    compiled = compiled_step(step, abstract, batch, key, good, asking(mesh)(0))
    of_mesh = lambda tree: sum(_bytes_here(a) for a in jax.tree.leaves(tree))
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    memory = cost.memory(compiled)
    return {
        "mesh": dict(mesh.shape),
        "parameters": {**{f"{name}, trained": count(tree) for name, tree in abstract.params.items()},
                       **{f"{name}, held": count(tree) for name, tree in abstract.others.items()}},
        "bytes": {"parameters": of_mesh((abstract.params, abstract.others)), "averages": of_mesh((abstract.ema, abstract.powers)),
                  "optimiser": of_mesh(abstract.opt_state), "batch": of_mesh(batch),
                  "of the update itself": memory.temporary + memory.outputs, "in all": memory.total},
        "collectives": cost.collectives(compiled.as_text(), mesh.size),
        "flops_per_image": cost.flops(step, abstract, batch, key) / size,
    }


def table(figures: Mapping[str, Any]) -> List[str]:
    """The figures of `figures_of`, a line each."""
    lines = ["  mesh: " + " x ".join(f"{axis}={n}" for axis, n in figures["mesh"].items())]
    lines += [f"  parameters of {name}: {n:,}" for name, n in figures["parameters"].items()]
    lines += [f"  bytes per device, {name}: {_size(n)}" for name, n in figures["bytes"].items()]
    lines += [f"  {kind} per step: {count:.0f}, {_size(size)} received by each device"
              for kind, (count, size) in figures["collectives"].items()]
    if not figures["collectives"]:
        lines.append("  collectives per step: none")
    return lines + [f"  operations per image: {figures['flops_per_image'] / 1e9:,.4g} GFLOP (matrix products and convolutions)"]


def _bytes_here(a: jax.ShapeDtypeStruct) -> int:
    """Bytes of the part of an array that one device holds."""
    shape = a.sharding.shard_shape(a.shape)
    count = 1
    for n in shape:
        count *= n
    return count * (jnp.dtype(a.dtype).itemsize if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else 8)


def _size(n: float) -> str:
    unit, name = next((unit, name) for unit, name in ((GB, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if n >= unit or unit == 1)
    return f"{n / unit:,.4g} {name}"


def _memory_of(device: jax.Device) -> float:
    """Bytes that a device has."""
    stated = device.memory_stats() or {}
    return stated.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
