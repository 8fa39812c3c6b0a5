"""What a data source is, and the two things every image source needs: a cache of decoded pixels and a square crop."""
import dataclasses
from typing import Callable, Mapping, Optional, Sequence, Tuple

import numpy as np

CACHE_BYTES = 2**28  # sources whose decoded pixels fit in this are kept in memory


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to images with or without a class.

    image_shape: (H, W, C). num_classes: None where the images carry no class; then class_names is empty.
    read: ids (each 0..size-1, any order, repeats allowed) -> {"image": uint8 [n, H, W, C], "class": int32 [n]}, without
      "class" where num_classes is None. The arrays are the caller's to change; it may be called from several threads.
    """
    name: str
    image_shape: Tuple[int, int, int]
    num_classes: Optional[int]
    class_names: Tuple[str, ...]
    size: int
    read: Callable[[Sequence[int]], Mapping[str, np.ndarray]]


def cached(source: Source, limit: int = CACHE_BYTES) -> Source:
    """The source with every example kept in one uint8 array once it has been read; as it is where that would pass `limit`.

    Nothing is read ahead: the first epoch pays for decoding and later ones copy rows. The array belongs to the process,
    so each worker process of a pipeline fills its own.
    """
    if source.size * int(np.prod(source.image_shape)) > limit:
        return source
    image = np.empty((source.size, *source.image_shape), np.uint8)  # pages are claimed as they are written
    label = np.empty(source.size, np.int32)
    have = np.zeros(source.size, bool)
    return dataclasses.replace(source, read=_Cache(source.read, image, label, have, source.num_classes is not None))


@dataclasses.dataclass(frozen=True)
class _Cache:
    fetch: Callable
    image: np.ndarray
    label: np.ndarray
    have: np.ndarray
    labelled: bool

    def __call__(self, ids):
        ids = np.asarray(ids)
        missing = np.unique(ids[~self.have[ids]])
        if len(missing):
            batch = self.fetch(missing.tolist())
            self.image[missing] = batch["image"]
            if self.labelled:
                self.label[missing] = batch["class"]
            self.have[missing] = True  # last, so that another thread never sees a row before its pixels
        batch = {"image": self.image[ids]}
        return {**batch, "class": self.label[ids]} if self.labelled else batch


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
