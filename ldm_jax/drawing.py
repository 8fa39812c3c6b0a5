"""The pictures that a run leaves, and the real examples whose conditions they are drawn under."""
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import jax
import numpy as np

from ldm_jax import api, recipe
from ldm_jax.data.captions import tokenized
from ldm_jax.evaluation import pictures
from ldm_jax.machine import compiler_options
from ldm_jax.types import UserError, example_keys, fold_in, to_host, to_signed, to_unit


def draw(pipeline: api.Pipeline, source, workdir: str, tag: Optional[str]) -> List[str]:
    """Pictures of a run: with a tag the small one that follows training, without it the three that end it."""
    def path(name):
        return os.path.join(workdir, "samples", f"{tag}_{name}.png" if tag else f"{name}.png")

    if pipeline.system.reconstruct is not None:
        real = source.read(range(16))["image"]
        again = reconstruct(pipeline, real)
        return [pictures.save(path("reconstructions"), [real[:8], again[:8], real[8:], again[8:]])]
    if pipeline.system.sample is None:
        return []
    if set(pipeline.system.conditioners) - class_of(pipeline.system):
        return _draw_conditions(pipeline, held_out(api.read_config(workdir)), path, tag)
    classes = pipeline.system.num_classes
    rows, columns = (min(classes, 20), 10) if classes else (8, 8)
    cond = np.repeat(np.arange(rows), columns) if classes else None
    images = pipeline.sample(0, num=rows * columns, cond=cond).reshape(rows, columns, *pipeline.system.image_shape)
    out = [pictures.save(path("grid"), images)]
    if tag:
        return out
    out.append(_denoising(pipeline, rows, cond[::columns] if classes else None, path))
    real = source.read(np.random.default_rng(0).permutation(source.size)[:source.size and 2000])
    beside = []
    for row in range(rows):
        mine = real["image"][real["class"] == row] if classes else real["image"][row * 5:]
        beside.append(np.concatenate([pictures.to_uint8(mine[:5]), pictures.to_uint8(images[row, :5])]))
    out.append(pictures.save(path("real_and_generated"), beside))
    return out


def class_of(system) -> set:
    """The name of the conditioner that is the class, if there is one."""
    return {name for name, conditioner in system.conditioners.items() if "num_classes" in conditioner.needs}


def _denoising(pipeline: api.Pipeline, rows: int, cond: Any, path) -> str:
    """A batch on its way from noise, a row per picture."""
    _, visited = pipeline.sample(0, num=rows, cond=cond, trajectory=True)
    shown = np.unique(np.linspace(0, pipeline.defaults["steps"], 11).round().astype(int))
    return pictures.save(path("denoising"), list(visited[shown].swapaxes(0, 1)))


def conditions_of(system, source, num: int, seed: int) -> Tuple[Dict[str, Any], np.ndarray]:
    """The conditions of `num` examples of `source`, by name, and their pictures."""
    source, ids = tokenized(source, system.conditioners), np.resize(np.random.default_rng(seed).permutation(source.size), num)
    batch, keys = source.read(ids), example_keys(jax.random.key(seed), num)
    drawn = {name: jax.jit(c.draw)(batch, fold_in(keys, i)) for i, (name, c) in enumerate(system.conditioners.items())}
    return jax.tree.map(np.asarray, drawn), batch["image"]


def shown(system, cond: Mapping[str, Any]) -> List[np.ndarray]:
    """Pictures of those conditions that can be looked at."""
    return [np.asarray(c.show(cond[name])) for name, c in system.conditioners.items() if c.show and name in cond]


def _draw_conditions(pipeline: api.Pipeline, source, path, tag: Optional[str]) -> List[str]:
    """As `draw`, under the conditions of real examples: rows of conditions, results and the real pictures below each other."""
    cond, real = conditions_of(pipeline.system, source, 32, 0)
    images = pipeline.sample(0, cond=cond)
    rows = [*shown(pipeline.system, cond), images]
    out = [pictures.save(path("grid"), interleaved(rows, 8))]
    if not tag:
        out.append(_denoising(pipeline, 8, jax.tree.map(lambda a: a[:8], cond), path))
        out.append(pictures.save(path("real_and_generated"), interleaved([*rows, real], 8)))
    return out


def interleaved(rows: Sequence[np.ndarray], columns: int) -> List[np.ndarray]:
    """Sequences of as many pictures, cut into lines that alternate: the first of each sequence, then the second, and so on."""
    return [pictures.to_uint8(row[i:i + columns]) for i in range(0, len(rows[0]), columns) for row in rows]


def reconstruct(pipeline: api.Pipeline, images: np.ndarray) -> np.ndarray:
    """uint8 images through a first stage, [N, H, W, C] in [0, 1]."""
    return in_parts(lambda params, image: to_unit(pipeline.system.reconstruct(params, to_signed(image))), pipeline, images)


def in_parts(f, pipeline: api.Pipeline, images: np.ndarray, size: int = 250) -> np.ndarray:
    """f(params, images) in parts of one size, the last one padded."""
    run, out = jax.jit(f, compiler_options=compiler_options()), []
    for start in range(0, len(images), size):
        ids = np.minimum(np.arange(start, start + min(size, len(images))), len(images) - 1)
        out.append(to_host(run(pipeline.params, images[ids])))
    return np.concatenate(out)[:len(images)]


def held_out(config: Mapping[str, Any]):
    """The test split, or what is trained on where there is none."""
    try:
        return recipe.build_source(config["data"], "test")
    except UserError:
        return recipe.build_source(config["data"], "train")
