"""Large numbers of pictures, such as the 50,000 that a Frechet distance is taken over, as arrays on disk."""
import hashlib
import json
import os
from typing import Any, Callable, Mapping, Optional

import jax
import numpy as np

from ldm_jax import paths
from ldm_jax.evaluation import pictures
from ldm_jax.parallel.processes import wait_for_all
from ldm_jax.sampling import BATCH, Pipeline
from ldm_jax.training.checkpoint import tree_hash
from ldm_jax.training.logs import progress
from ldm_jax.types import UserError, example_keys, writes_files

PART = 1000  # pictures in a file


def collect(pipeline: Pipeline, directory: str, *, num: int, seed: int, cond: Optional[Mapping[str, Any]] = None,
            mark: Callable[[int], None] = lambda part: None, **options: Any) -> int:
    """Write pictures 0 ... num - 1 of `seed` to DIRECTORY/00000000.npy, 00001000.npy, ..., uint8 [<= 1000, H, W, C]; how many are new.

    Picture i is the one that `pipeline.sample(seed, num, cond)` makes. Files that are there are kept, so that an interrupted call goes on
    where it was; of several processes the first writes. Where classes are asked for, labels.npy holds them.
    """
    told = b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves((cond, options)))
    stamp = {"params": tree_hash(pipeline.params), "sampler": {**pipeline.defaults}, "seed": seed, "num": num,
             "condition or picture": hashlib.sha256(told).hexdigest()}
    _adopt(directory, json.loads(json.dumps(stamp)))
    keys, new = example_keys(jax.random.key(seed), num), 0
    starts = [start for start in range(0, num, PART) if not _complete(_path(directory, start), min(PART, num - start))]
    if writes_files():
        if cond and "class" in cond:
            _write(os.path.join(directory, "labels.npy"), np.asarray(cond["class"], np.int32))
    with progress(num, num - sum(min(PART, num - start) for start in starts), "pictures") as bar:
        for start in starts:
            mark(start)
            end = min(start + PART, num)
            options["batch_size"] = _batch_size(end - start, pipeline)
            images = pipeline.sample(keys[start:end], num=end - start, cond=_part(cond, start, end), **options)
            if writes_files():
                _write(_path(directory, start), pictures.to_uint8(images))
            bar.update(end - start)
            new += end - start
    return new


def _batch_size(count: int, pipeline: Pipeline) -> int:
    """Of a file, so that its pictures are the same bit for bit whether or not the process that makes it has made others before."""
    return min(pipeline.defaults.get("batch_size") or BATCH, 1 << (count - 1).bit_length())


def _adopt(directory: str, stamp: Mapping[str, Any]) -> None:
    """Make `directory` that of these pictures, or check that it is."""
    path = os.path.join(directory, "made_of.json")
    if paths.exists(path):
        there = json.loads(paths.read_text(path))
        differs = sorted(name for name in stamp if there.get(name) != stamp[name])
        if differs:
            raise UserError(f"{directory!r} holds pictures that were made with other {', '.join(differs)}; move it away, or choose "
                            f"another --seed")
    wait_for_all("read what is there")
    if writes_files():
        paths.makedirs(directory)
        paths.write_text(path, json.dumps(stamp, indent=2))


def _path(directory: str, start: int) -> str:
    return os.path.join(directory, f"{start:08d}.npy")


def _complete(path: str, count: int) -> bool:
    try:
        return len(np.load(paths.local(path), mmap_mode="r")) == count
    except (OSError, ValueError):
        return False


def _write(path: str, array: np.ndarray) -> None:
    with paths.new_file(path) as partial, open(partial, "wb") as f:
        np.save(f, array)


def _part(value: Any, start: int, end: int) -> Any:
    """Rows start ... end - 1 of every list and array of a condition."""
    if isinstance(value, Mapping):
        return {name: _part(v, start, end) for name, v in value.items()}
    return None if value is None else value[start:end]
