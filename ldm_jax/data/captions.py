"""Texts as a field of data: UTF-8 bytes [LENGTH], filled up with zeros, so that they pass through every source and cache."""
import dataclasses
import json
import os
from pathlib import PurePosixPath
from typing import Any, Callable, Dict, Mapping, Sequence

import numpy as np

from ldm_jax import paths
from ldm_jax.data.base import Field, Source
from ldm_jax.types import UserError

LENGTH = 1024
FIELD = Field((LENGTH,), "uint8")


def encoded(text: str) -> np.ndarray:
    """A text as uint8 [LENGTH]; what does not fit is cut off at a whole character."""
    raw = text.encode("utf-8")[:LENGTH].decode("utf-8", "ignore").encode("utf-8")
    return np.frombuffer(raw.ljust(LENGTH, b"\0"), np.uint8)


def decoded(rows: np.ndarray) -> Sequence[str]:
    """The texts of uint8 [n, LENGTH]."""
    return [row.tobytes().rstrip(b"\0").decode("utf-8") for row in np.asarray(rows, np.uint8)]


def of_folder(root: str, files: Sequence[PurePosixPath],
              listed: Sequence[PurePosixPath]) -> Callable[[Sequence[PurePosixPath]], np.ndarray]:
    """files -> their captions, encoded: from ROOT/metadata.jsonl, lines {"file_name": ..., "text": ...}, or from FILE.txt beside FILE.png.

    listed: all that is in `root`.

    Raises:
      UserError: for files without a caption, and lines that are not of that form.
    """
    told: Dict[str, str] = {}
    there, path = set(listed), os.path.join(root, "metadata.jsonl")
    if PurePosixPath("metadata.jsonl") in there:
        for number, line in enumerate(paths.read_text(path).splitlines(), 1):
            try:
                entry: Mapping[str, Any] = json.loads(line or "{}")
                if line.strip():
                    told[entry["file_name"]] = str(entry["text"])
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f'{path}, line {number}: not {{"file_name": ..., "text": ...}} ({e})') from e
    missing = [f for f in files if f.as_posix() not in told and f.with_suffix(".txt") not in there]
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} images in {root} have no caption, such as {missing[0]}; name them in "
                        f"metadata.jsonl, or put the text beside each, as {missing[0].with_suffix('.txt')}")

    def captions(wanted: Sequence[PurePosixPath]) -> np.ndarray:
        beside = [f for f in wanted if f.as_posix() not in told]
        found = dict(zip(beside, paths.read_all([os.path.join(root, f.with_suffix(".txt")) for f in beside])))
        return np.stack([encoded(found[f].decode("utf-8").strip() if f in found else told[f.as_posix()]) for f in wanted])

    return captions


def tokenized(source: Source, conditioners: Mapping[str, Any]) -> Source:
    """The source with the tokens that its field "text" is for the conditioners that take texts, in the place of that.

    Raises:
      UserError: for a source without texts where there is such a conditioner.
    """
    readers = [conditioner.tokens for conditioner in conditioners.values() if conditioner.tokens is not None]
    if not readers:
        return source
    if "text" not in source.fields:
        raise UserError(f"data {source.name!r} has no texts, which this model is told; set data.fields.text=({LENGTH},) with a source "
                        f"that has them, such as a folder with metadata.jsonl")

    def tokens(texts):
        return {name: a for reader in readers for name, a in reader(texts).items()}

    fields = {name: field for name, field in source.fields.items() if name != "text"}
    fields.update({name: Field(a.shape[1:], str(a.dtype)) for name, a in tokens([""]).items()})

    def read(ids):
        batch = dict(source.read(ids))
        return {**batch, **tokens(decoded(batch.pop("text")))}

    return dataclasses.replace(source, read=read, fields=fields)
