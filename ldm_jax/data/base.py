"""What a data source is, and the two things every image source needs: a cache of decoded examples and a square crop."""
import dataclasses
import math
from typing import Callable, Mapping, Optional, Sequence, Tuple

import numpy as np

from ldm_jax.types import UserError

CACHE_BYTES = 2**28  # sources whose decoded examples fit in this are kept in memory


@dataclasses.dataclass(frozen=True)
class Field:
    """What an example has beside image and class: an array of this shape and dtype.

    mirrored: what becomes of it when the picture is mirrored left to right. "same": nothing; "spatial": its second axis is
      mirrored too; "untrue": it describes another picture then, so that its source cannot be mirrored.
    """
    shape: Tuple[int, ...]
    dtype: str = "float32"
    mirrored: str = "same"


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to images with or without a class, and to what else each example has.

    image_shape: (H, W, C). num_classes: None where the images carry no class; then class_names is empty.
    read: ids (each 0..size-1, any order, repeats allowed) -> {"image": uint8 [n, H, W, C], "class": int32 [n]}, without
      "class" where num_classes is None, and with an array [n, ...] for each of `fields`. The arrays are the caller's to change;
      it may be called from several threads.
    fields: name -> Field, beyond image and class.
    """
    name: str
    image_shape: Tuple[int, int, int]
    num_classes: Optional[int]
    class_names: Tuple[str, ...]
    size: int
    read: Callable[[Sequence[int]], Mapping[str, np.ndarray]]
    fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)


def cached(source: Source, limit: int = CACHE_BYTES) -> Source:
    """The source with every example kept in memory once it has been read; as it is where that would pass `limit` bytes.

    Nothing is read ahead: the first epoch pays for decoding and later ones copy rows. The arrays belong to the process,
    so each worker process of a pipeline fills its own.
    """
    fields = {"image": Field(source.image_shape, "uint8"), **source.fields}
    if source.num_classes is not None:
        fields["class"] = Field((), "int32")
    if source.size * sum(math.prod(f.shape) * np.dtype(f.dtype).itemsize for f in fields.values()) > limit:
        return source
    arrays = {name: ((source.size, *f.shape), f.dtype) for name, f in fields.items()}  # pages are claimed as they are written
    return dataclasses.replace(source, read=_empty(source.read, arrays, source.size))


@dataclasses.dataclass(frozen=True)
class _Cache:
    fetch: Callable
    kept: Mapping[str, np.ndarray]
    have: np.ndarray

    def __reduce__(self):
        """A copy in another process begins empty: this one may be filled just now by a thread, and half of it would look like all."""
        return _empty, (self.fetch, {name: (array.shape, array.dtype) for name, array in self.kept.items()}, len(self.have))

    def __call__(self, ids):
        ids = np.asarray(ids)
        missing = np.unique(ids[~self.have[ids]])
        if len(missing):
            batch = self.fetch(missing.tolist())
            for name, array in self.kept.items():
                array[missing] = batch[name]
            self.have[missing] = True  # last, so that another thread never sees a row before its values
        return {name: array[ids] for name, array in self.kept.items()}


def _empty(fetch, arrays, size: int) -> _Cache:
    return _Cache(fetch, {name: np.empty(shape, dtype) for name, (shape, dtype) in arrays.items()}, np.zeros(size, bool))


def first(source: Source, limit: int) -> Source:
    """The source's first `limit` examples, all of them where there are no more."""
    if limit < 1:
        raise UserError(f"limit={limit} of the data must be 1 or more")
    return dataclasses.replace(source, size=min(source.size, limit))


def spatial(source: Source) -> Tuple[str, ...]:
    """The names of what is mirrored with a picture.

    Raises:
      UserError: where the source has a field that would not be true of a mirror image.
    """
    untrue = sorted(name for name, field in source.fields.items() if field.mirrored == "untrue")
    if untrue:
        raise UserError(f"flip=True would make the field {untrue[0]!r} of data {source.name!r} untrue; set data.flip=False, or leave the "
                        f"field out of data.fields")
    return "image", *(name for name, field in source.fields.items() if field.mirrored == "spatial")


def in_memory(name: str, image: np.ndarray, label: np.ndarray, class_names: Sequence[str]) -> Source:
    """A labelled source over arrays: image uint8 [n, H, W, C], label [n]."""
    label = label.astype(np.int32)
    return Source(name, image.shape[1:], len(class_names), tuple(class_names), len(image),
                  lambda ids: {"image": image[np.asarray(ids)], "class": label[np.asarray(ids)]})


def square(image, size: int):
    """A PIL image scaled until its shorter side is `size` (bicubic, the filter widened when shrinking), then centre-cropped."""
    from PIL import Image

    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
