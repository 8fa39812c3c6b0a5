"""What a run starts from: a trained first stage and its latents' statistics, another run, and the cache of latents."""
import json
import os
import warnings
from typing import Any, Callable, Dict, Mapping

import jax
import numpy as np

from ldm_jax import api, paths
from ldm_jax.data.base import Source, spatial
from ldm_jax.data.latents import are_there, open_latents, rows_of, write_latents
from ldm_jax.machine import compiler_options
from ldm_jax.parallel.processes import wait_for_all
from ldm_jax.parallel.sharding import batch_sharding, make_mesh, replicated
from ldm_jax.systems.latent import measure
from ldm_jax.training.checkpoint import Checkpoints, tree_hash
from ldm_jax.training.logs import progress
from ldm_jax.types import PyTree, UserError, to_host, to_signed

MEASURED = 4096  # pictures that the statistics are taken over
ENCODED_AT_ONCE = 256
ROOTS = ("params", "ema", "others")  # of what a checkpoint holds: the trained parameters, their average, what is held fixed


def given(config: Mapping[str, Any], workdir: str, source: Source, system: Any, **how: Any) -> Mapping[str, PyTree]:
    """What a new run does not start from scratch: the parameters of the run `init_dir` or of the published checkpoint `init_from`, or a
    first stage, or what files hold.

    init_part, of the run in `init_dir`: "" or "ema" the averages, "params" what was averaged, with all that is held fixed; or a path
    such as "ema/net/down_0_block_0" or "others/autoencoder", what lies there alone. All else is as without `init_dir`.

    Raises:
      UserError: when the run in `init_dir` has other parameters, or no such part.
    """
    directory, part = config.get("init_dir"), (config.get("init_part") or "").strip("/")
    if part and not directory:
        raise UserError(f"init_part={part!r} is a part of the run in init_dir, which is empty; give --config.init_dir=RUN")
    theirs, ours = {}, jax.eval_shape(system.init, jax.random.key(0))
    if directory:
        theirs = read_part(directory, part) if part else api.load(directory).params
        shapes = [_shapes(tree) for tree in (theirs, ours)]
        whole = part in ("", "params", "ema")
        names = {*shapes[0], *shapes[1]} if whole else set(shapes[0])
        differs = sorted(name for name in names if shapes[0].get(name) != shapes[1].get(name))
        if differs:
            raise UserError(f"init_dir={directory!r} holds other parameters: {differs[0]} has shape {shapes[0].get(differs[0])} there and "
                            f"{shapes[1].get(differs[0])} here, and {len(differs) - 1} more; give a run of the same net"
                            + (", or another init_part" if part else ""))
        if whole:
            return theirs
    staged = "first_stage" in config and not config.get("init_from")
    if staged and not set(theirs) <= set(system.trained):
        raise UserError(f"init_part={part!r} is of the first stage, which belongs to its latents' statistics; give its run as "
                        f"first_stage_dir, or a part of {', '.join(system.trained)}")
    return _merged(first_stage(config, workdir, source, **how) if staged else system.read() if system.read else {}, theirs)


def read_part(directory: str, part: str) -> Mapping[str, PyTree]:
    """What `part`, see `given`, names in the newest good checkpoint of the run in `directory`, nested as a system's parameters are.

    Raises:
      UserError: for a path that is not there; the message lists what is.
    """
    api.read_config(directory)
    root, *path = part.split("/")
    if root not in ROOTS:
        raise UserError(f"init_part={part!r} does not begin with one of {', '.join(ROOTS)}; give such as ema, params or ema/net")
    nothing = UserError(f"init_dir={directory!r} holds no checkpoint that can be read; train it first")
    if not paths.isdir(os.path.join(directory, "checkpoints")):
        raise nothing
    with Checkpoints(os.path.join(directory, "checkpoints"), read_only=True) as checkpoints:
        tree = there = checkpoints.saved()
        if there is None:
            raise nothing
        for i, name in enumerate((root, *path)):
            if not isinstance(tree, Mapping) or name not in tree:
                known = ", ".join(sorted(tree)) if isinstance(tree, Mapping) else "nothing"
                raise UserError(f"init_part={part!r}: no {name!r} in {'/'.join((root, *path)[:i]) or directory}; there is: {known}")
            tree = tree[name]
        wanted = tree
        for name in reversed(path):
            wanted = {name: wanted}
        fixed = {} if path or root == "others" else {"others": there.get("others") or {}}
        _, state, _ = checkpoints.restore({root: wanted, **fixed}, warn=warnings.warn)
    return {**state.get("others", {}), **state[root]}


def _shapes(tree: PyTree) -> Dict[str, Any]:
    """Path -> shape."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): a.shape for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _merged(tree: PyTree, part: PyTree) -> PyTree:
    """`tree` with what `part` has in its place, or beside it."""
    if not (isinstance(tree, Mapping) and isinstance(part, Mapping)):
        return part
    return {**tree, **{name: _merged(tree[name], value) if name in tree else value for name, value in part.items()}}


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


def latent_cache(directory: str, source: Source, autoencoder: Any, params: Mapping[str, PyTree], *, flip: bool,
                 say: Callable[[str], None]) -> Source:
    """The latents of `source` as a source of "mean" and "logvar" [h, w, c], float16, and of the source's other fields.

    They are computed once and lie in `directory`, stamped with the autoencoder, the statistics and the data. With `flip` the mirror
    image of example i is example i + size. Each process encodes a part of the examples, on its own devices. An autoencoder without
    spread has no "logvar".

    Raises:
      UserError: when `directory` holds the latents of another autoencoder, other statistics or other data.
    """
    stamp = {"autoencoder": tree_hash(params["autoencoder"]), "statistics": tree_hash(params["latent"]),
             "data": f"{source.name}, {source.size} images" + (" and their mirror images" if flip else "")}
    size = source.size * (1 + flip)
    if not are_there(directory):
        say(f"latents: encoding {source.size} images{' and their mirror images' if flip else ''} to {directory}")
        mesh = make_mesh(devices=jax.local_devices())
        sharded, share = batch_sharding(mesh), (jax.process_index(), jax.process_count())
        first, end = rows_of(share, size)
        encode = jax.jit(lambda params, image: autoencoder.posterior(params, to_signed(image)), compiler_options=compiler_options(),
                         in_shardings=(replicated(mesh), sharded), out_shardings=sharded)
        weights = jax.device_put(to_host(params["autoencoder"]), replicated(mesh))
        count = -(-ENCODED_AT_ONCE // mesh.size) * mesh.size

        def read(ids: np.ndarray) -> Dict[str, np.ndarray]:
            batch = dict(source.read((ids % source.size).tolist()))
            for name in spatial(source) if flip else ():
                batch[name][ids >= source.size] = batch[name][ids >= source.size, :, ::-1]
            mean, logvar = encode(weights, batch.pop("image"))
            batch["mean"] = np.asarray(mean, np.float16)
            return batch if autoencoder.codes else {**batch, "logvar": np.asarray(logvar, np.float16)}

        def batches():
            with progress(end - first, 0, "latents") as bar:
                for start in range(first, end, count):
                    rows = min(count, end - start)
                    yield {name: a[:rows] for name, a in read(np.minimum(np.arange(start, start + count), end - 1)).items()}
                    bar.update(rows)

        write_latents(directory, batches(), stamp=stamp, size=size, share=share, wait=wait_for_all)
    return open_latents(directory, stamp=stamp, like=source)
