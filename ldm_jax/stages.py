"""What a run starts from: a trained first stage and its latents' statistics, another run, and the cache of latents."""
import hashlib
import json
import os
from typing import Any, Callable, Dict, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax import api
from ldm_jax.data.base import Source, spatial
from ldm_jax.data.latents import are_there, open_latents, write_latents
from ldm_jax.systems.latent import measure
from ldm_jax.training.checkpoint import fingerprints
from ldm_jax.training.logs import progress
from ldm_jax.parallel.sharding import batch_sharding, replicated
from ldm_jax.types import PyTree, UserError, to_signed

MEASURED = 4096  # pictures that the statistics are taken over
ENCODED_AT_ONCE = 256


def given(config: Mapping[str, Any], workdir: str, source: Source, system: Any, **how: Any) -> Mapping[str, PyTree]:
    """What a new run does not start from scratch: the parameters of the run `init_dir` or of the published checkpoint `init_from`, or a
    first stage, or what files hold.

    Raises:
      UserError: when the run in `init_dir` has other parameters.
    """
    directory = config.get("init_dir")
    if not directory:
        ours = "first_stage" in config and not config.get("init_from")
        return first_stage(config, workdir, source, **how) if ours else system.read() if system.read else {}
    theirs, ours = api.load(directory).params, jax.eval_shape(system.init, jax.random.key(0))
    shapes = [{jax.tree_util.keystr(path, simple=True, separator="/"): a.shape for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}
              for tree in (theirs, ours)]
    differs = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if differs:
        raise UserError(f"init_dir={directory!r} holds other parameters: {differs[0]} has shape {shapes[0].get(differs[0])} there and "
                        f"{shapes[1].get(differs[0])} here, and {len(differs) - 1} more; give a run of the same net")
    return theirs


def first_stage(config: Mapping[str, Any], workdir: str, source: Source, *, train: Callable[[Mapping[str, Any], str], api.Pipeline],
                say: Callable[[str], None]) -> Dict[str, Any]:
    """The trained autoencoder and the statistics of its latents: what a latent system holds fixed.

    train: trains a config in a workdir, or finds it trained; called with WORKDIR/first_stage unless `first_stage_dir` names a run.
    """
    directory = config.get("first_stage_dir") or None
    if directory:
        ours, theirs = (_chosen(c) for c in (config["first_stage"]["autoencoder"], api.read_config(directory).get("autoencoder")))
        if ours != theirs:
            raise UserError(f"first_stage_dir={directory!r} holds autoencoder {theirs}, the config states {ours}; make them equal")
        pipeline = api.load(directory)
    else:
        pipeline = train(config["first_stage"], os.path.join(workdir, "first_stage"))
    autoencoder, params = pipeline.nets["autoencoder"]
    ids = np.random.default_rng(config["seed"]).permutation(source.size)[:MEASURED]
    images = (source.read(part)["image"] for part in np.array_split(ids, -(-len(ids) // ENCODED_AT_ONCE)))
    statistics = measure(autoencoder, params, images, jax.random.key(config["seed"]))
    say("latents: shift {shift}, scale {scale}".format(**{k: np.round(np.asarray(v), 3) for k, v in statistics.items()}))
    return {"autoencoder": params, "latent": statistics}


def _chosen(choice: Any) -> Any:
    """Of a choice's section the name and its options, as JSON gives them back."""
    return choice and json.loads(json.dumps({"name": choice["name"], **(choice.get(choice["name"]) or {})}))


def latent_cache(directory: str, source: Source, autoencoder: Any, params: Mapping[str, PyTree], *, flip: bool, mesh: Mesh,
                 say: Callable[[str], None]) -> Source:
    """The latents of `source` as a source of "mean" and "logvar" [h, w, c], float16, and of the source's other fields.

    They are computed once and lie in `directory`, stamped with the autoencoder, the statistics and the data. With `flip` the mirror
    image of example i is example i + size. An autoencoder without spread has no "logvar".

    Raises:
      UserError: when `directory` holds the latents of another autoencoder, other statistics or other data.
    """
    stamp = {"autoencoder": _hash(params["autoencoder"]), "statistics": _hash(params["latent"]),
             "data": f"{source.name}, {source.size} images" + (" and their mirror images" if flip else "")}
    size = source.size * (1 + flip)
    if not are_there(directory):
        say(f"latents: encoding {source.size} images{' and their mirror images' if flip else ''} to {directory}")
        sharded = batch_sharding(mesh)
        encode = jax.jit(lambda params, image: autoencoder.posterior(params, to_signed(image)),
                         in_shardings=(replicated(mesh), sharded), out_shardings=sharded)
        weights = jax.device_put(params["autoencoder"], replicated(mesh))
        count = -(-ENCODED_AT_ONCE // mesh.size) * mesh.size

        def read(ids: np.ndarray) -> Dict[str, np.ndarray]:
            batch = dict(source.read((ids % source.size).tolist()))
            for name in spatial(source) if flip else ():
                batch[name][ids >= source.size] = batch[name][ids >= source.size, :, ::-1]
            mean, logvar = encode(weights, batch.pop("image"))
            batch["mean"] = np.asarray(mean, np.float16)
            return batch if autoencoder.codes else {**batch, "logvar": np.asarray(logvar, np.float16)}

        def batches():
            with progress(size, 0, "latents") as bar:
                for start in range(0, size, count):
                    rows = min(count, size - start)
                    yield {name: a[:rows] for name, a in read(np.minimum(np.arange(start, start + count), size - 1)).items()}
                    bar.update(rows)

        write_latents(directory, batches(), stamp=stamp, size=size)
    return open_latents(directory, stamp=stamp, like=source)


def _hash(params: PyTree) -> str:
    """A short name for the values of a tree of arrays."""
    return hashlib.sha256(json.dumps(fingerprints(params), sort_keys=True).encode()).hexdigest()[:16]
