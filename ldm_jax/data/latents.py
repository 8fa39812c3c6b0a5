"""Latents of a trained first stage on disk, in array_record files, so that the second stage never runs the encoder.

A directory holds latents-00000-of-00004.array_record and so on, and index.json: what the records consist of, and the stamp, which
says what they were made with. A cache is written under a temporary name and appears whole or not at all.
"""
import contextlib
import json
import os
import shutil
import tempfile
from typing import Any, Callable, Dict, Iterable, List, Mapping, Tuple

import numpy as np

from ldm_jax import paths
from ldm_jax.data.base import Field, Source
from ldm_jax.types import UserError

INDEX = "index.json"


def are_there(directory: str) -> bool:
    """Whether a cache is there, whole or damaged; what arrived in a bucket before the index does not count."""
    return paths.exists(os.path.join(directory, INDEX) if paths.is_remote(directory) else directory)


def rows_of(share: Tuple[int, int], size: int) -> Tuple[int, int]:
    """(first, end) of the examples that process i of n writes."""
    i, n = share
    return size * i // n, size * (i + 1) // n


def write_latents(directory: str, batches: Iterable[Mapping[str, np.ndarray]], *, stamp: Mapping[str, Any], size: int,
                  shards: int = 4, share: Tuple[int, int] = (0, 1), wait: Callable[[str], None] = lambda why: None) -> None:
    """Write examples 0..size-1, given as `batches` of equally named arrays with a leading axis, to a new `directory`.

    stamp: JSON values that `open_latents` will compare.
    share: (i, n): this process gives those of `rows_of`, each of n processes its own, to `shards` files of its own.
    wait: returns when all of them have called it.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    (process, processes), (first, end) = share, rows_of(share, size)
    names = [f"latents-{i:05d}-of-{shards * processes:05d}.array_record" for i in range(shards * processes)]
    files, mine = names[process * shards:][:shards], end - first
    ends = [mine * (i + 1) // shards for i in range(shards)]
    remote = paths.is_remote(directory)
    with tempfile.TemporaryDirectory(prefix="ldm_jax-") if remote else contextlib.nullcontext(f"{directory}.partial") as partial:
        if process == 0 and not remote:
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(partial)
        wait("the directory of latents is new")
        writer, shard, done, fields = None, -1, 0, {}
        for batch in batches:
            batch = {name: np.ascontiguousarray(batch[name]) for name in sorted(batch)}
            fields = fields or {name: [str(a.dtype), list(a.shape[1:])] for name, a in batch.items()}
            for i in range(min(len(next(iter(batch.values()))), mine - done)):
                if writer is None or done == ends[shard]:
                    if writer is not None:
                        writer.close()
                    shard += 1
                    writer = ArrayRecordWriter(os.path.join(partial, files[shard]), "group_size:1")
                writer.write(b"".join(a[i].tobytes() for a in batch.values()))
                done += 1
        writer.close()
        if done != mine:
            raise ValueError(f"{done} examples were given of {mine}")
        for file in files if remote else ():
            paths.upload(os.path.join(partial, file), os.path.join(directory, file))
        wait("all latents are written")
        if process == 0:
            index = json.dumps({"stamp": dict(stamp), "size": size, "fields": fields, "files": names}, indent=2)
            paths.write_text(os.path.join(directory if remote else partial, INDEX), index)
            if not remote:
                os.replace(partial, directory)
        wait("the latents are there")


def open_latents(directory: str, *, stamp: Mapping[str, Any], like: Source) -> Source:
    """The cache in `directory` as a source of its fields; name, picture size and classes are those of `like`.

    Raises:
      UserError: when the stamp is another, or the files are damaged.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        here = paths.local_directory(directory)
        with open(os.path.join(here, INDEX)) as f:
            index = json.load(f)
        found, size, fields = index["stamp"], index["size"], index["fields"]
        files = [os.path.join(here, name) for name in index["files"]]
        missing = [file for file in files if not os.path.exists(file)]
        if missing:
            raise OSError(f"{missing[0]} is missing")
        records = ArrayRecordDataSource(files)
        if len(records) != size:
            raise OSError(f"{len(records)} records of {size}")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the latents in {directory!r} are damaged ({error}); remove the directory and they are made again") from error
    differs = [f"{name} ({found.get(name)} there, {value} here)" for name, value in stamp.items() if found.get(name) != value]
    if differs:
        raise UserError(f"the latents in {directory!r} were made with another {', '.join(differs)}; remove the directory and they are "
                        f"made again, or name another one")
    layout = _layout(fields)
    length = sum(count * dtype.itemsize for _, dtype, _, count in layout)

    def read(ids):
        rows = [np.frombuffer(record, np.uint8) for record in records.__getitems__([int(i) for i in ids])]
        if any(len(row) != length for row in rows):
            raise UserError(f"a record of the latents in {directory!r} is cut short; remove the directory and they are made again")
        rows, out, start = np.stack(rows), {}, 0
        for name, dtype, shape, count in layout:
            end = start + count * dtype.itemsize
            out[name] = np.ascontiguousarray(rows[:, start:end]).view(dtype).reshape(len(rows), *shape)
            start = end
        return out

    named = {name: Field(shape, str(dtype), "untrue") for name, dtype, shape, _ in layout if name != "class"}
    return Source(f"latents of {like.name}", like.image_shape, like.num_classes, like.class_names, size, read, named)


def _layout(fields: Dict[str, List]) -> List[Tuple[str, np.dtype, Tuple[int, ...], int]]:
    """(name, dtype, shape, values) of each field of a record, in the order in which they lie."""
    return [(name, np.dtype(dtype), tuple(shape), int(np.prod(shape))) for name, (dtype, shape) in sorted(fields.items())]
