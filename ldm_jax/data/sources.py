"""The data sources by name: each row of SOURCES is a function (split, named arguments) -> Source."""
import io
import os
import zlib
from pathlib import Path, PurePosixPath
from typing import Optional, Sequence

import numpy as np

from ldm_jax import paths
from ldm_jax.data import captions
from ldm_jax.data.base import Field, Source, cached, in_memory, square
from ldm_jax.data.records import tfds
from ldm_jax.types import UserError, lookup

SPLITS = ("train", "test")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose from: {', '.join(SPLITS)}")


def digits(split: str = "train") -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 x 1, their values 0..16 scaled to 0..255: 1,297 to train on, 500 held out.

    Of each class's n images, in the file's order, m = round(n 500 / 1797) are held out, evenly spaced: the r-th (from 0) where
    floor((r + 1) m / n) > floor(r m / n).
    """
    from sklearn.datasets import load_digits

    _check_split(split)
    data = load_digits()
    image = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]
    held_out = np.zeros(len(image), bool)
    for c in range(10):
        ids = np.flatnonzero(data.target == c)
        n, r = len(ids), np.arange(len(ids))
        m = round(n * 500 / len(image))
        held_out[ids] = (r + 1) * m // n > r * m // n
    chosen = held_out if split == "test" else ~held_out
    return in_memory("digits", image[chosen], data.target[chosen], [str(c) for c in range(10)])


# each row gives how far inside (positive) or outside (negative) a shape within |u|, |v| <= 1 the point (u, v) is, v downwards
_SHAPES = {
    "disc": lambda u, v: 1 - np.hypot(u, v),
    "square": lambda u, v: 0.85 - np.maximum(abs(u), abs(v)),
    "triangle": lambda u, v: np.minimum((0.9 + v) / 2 - abs(u), 0.9 - v) * 0.9,
    "diamond": lambda u, v: (1 - abs(u) - abs(v)) * 0.7,
    "plus": lambda u, v: np.minimum(1 - np.maximum(abs(u), abs(v)), 0.33 - np.minimum(abs(u), abs(v))),
    "cross": lambda u, v: np.minimum(0.95 - np.maximum(abs(u), abs(v)), (0.4 - abs(abs(u) - abs(v))) * 0.7),
    "ring": lambda u, v: 0.25 - abs(np.hypot(u, v) - 0.75),
    "frame": lambda u, v: 0.2 - abs(np.maximum(abs(u), abs(v)) - 0.7),
    "half disc": lambda u, v: np.minimum(1 - np.hypot(u, v + 0.5), v + 0.5),
    "bar": lambda u, v: np.minimum(1 - abs(u), 0.35 - abs(v)),
}


_SHAPE_FIELDS = {
    "vector": lambda size: Field((9,), mirrored="untrue"),
    "map": lambda size: Field((size, size), "uint8", "spatial"),
    "sequence": lambda size: Field((3, len(_SHAPES) + 3), mirrored="untrue"),
    "sequence_mask": lambda size: Field((3,), "uint8"),
}


def shapes(split: str = "train", *, size: int = 32, count: int = 4096, seed: int = 0, fields: Sequence[str] = (),
           cache: bool = True) -> Source:
    """Drawn pictures, size x size x 3: one bright shape of ten kinds, anywhere, of any colour, on a dark ground.

    Example i shows shape i mod 10; its place, size and colours come from (seed, split, i) alone.

    Args:
      count: examples in the split.
      fields: what each example also has. With its class, "vector" is everything that the picture was drawn from.
        "vector": x, y (downwards), radius in units of half the picture, then the shape's and the ground's red, green and blue,
          all in [-1, 1]: float32 [9].
        "map": uint8 [size, size], 0 for the ground and 1 + kind where the shape covers half of a pixel or more.
        "sequence": three tokens, the kind, the shape's colour and (x, y, radius), each one-hot in its last three numbers and with
          what it says before them: float32 [3, 13]. "sequence_mask", uint8 [3]: each is there in three examples of four.
    """
    _check_split(split)
    if size < 8 or count < 1:
        raise UserError(f"shapes need size >= 8 and count >= 1, got size {size}, count {count}")
    kinds = list(_SHAPES.values())
    kept = {name: lookup(_SHAPE_FIELDS, name, "field of shapes")(size) for name in fields}
    axis = (np.arange(size) + 0.5) / size * 2 - 1

    def draw(i: int) -> dict:
        rng = np.random.default_rng((seed, SPLITS.index(split), i))
        radius = rng.uniform(0.35, 0.6)
        x, y = rng.uniform(-0.9 + radius, 0.9 - radius, 2)
        ground, colour = rng.uniform(0, 90, 3), rng.uniform(60, 255, 3)
        colour[rng.integers(3)] = 255  # one channel full, so that the shape stands out from any ground
        kind = i % len(kinds)
        inside = kinds[kind]((axis[None, :] - x) / radius, (axis[:, None] - y) / radius)
        cover = np.clip(0.5 + inside * radius * size / 2, 0, 1)[..., None]  # the edge is one pixel wide
        place, rgb = np.array([x, y, radius]), colour / 127.5 - 1
        tokens = np.zeros((3, len(kinds) + 3))
        tokens[0, kind], tokens[1, :3], tokens[2, :3], tokens[:, -3:] = 1, rgb, place, np.eye(3)
        return {"image": np.rint(ground + cover * (colour - ground)).astype(np.uint8), "class": kind,
                "vector": np.concatenate([place, rgb, ground / 127.5 - 1]), "map": np.where(cover[..., 0] >= 0.5, 1 + kind, 0),
                "sequence": tokens, "sequence_mask": rng.random(3) < 0.75}

    def read(ids):
        drawn = [draw(int(i)) for i in ids]
        dtypes = {"image": "uint8", "class": "int32", **{name: field.dtype for name, field in kept.items()}}
        return {name: np.stack([example[name] for example in drawn]).astype(dtype) for name, dtype in dtypes.items()}

    source = Source("shapes", (size, size, 3), len(kinds), tuple(_SHAPES), count, read, kept)
    return cached(source) if cache else source


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def folder(split: str = "train", *, path: str, image_size: int, channels: int = 3, held_out: float = 0.1,
           fields: Sequence[str] = (), cache: bool = True) -> Source:
    """A directory of images: each subdirectory is a class, in the order of their names; without subdirectories, no classes.

    path: of this machine, or gs://BUCKET/..., whose images are fetched as they are read.
    fields: "text" for their captions, see `data.captions.of_folder`.

    Images are scaled and centre-cropped to image_size x image_size. The test split is a fixed fraction of the files, near
    `held_out`: those whose path within the directory has crc32 / 2^32 < held_out. So a file keeps its split when others
    are added, and held_out=0 trains on everything.

    Raises:
      UserError: a missing or empty directory, an empty split; on reading, an image that cannot be decoded.
    """
    _check_split(split)
    if image_size < 1 or channels not in (1, 3) or not 0 <= held_out < 1:
        raise UserError(f"folder needs image_size >= 1, channels 1 or 3 and 0 <= held_out < 1, "
                        f"got image_size {image_size}, channels {channels}, held_out {held_out}")
    remote = paths.is_remote(path)
    root = os.fspath(path).rstrip("/") if remote else str(Path(path).expanduser())
    if not paths.isdir(root):
        raise UserError(f"no image directory {root}; give the path of a directory of images, or of one subdirectory per class")
    listed = [f for f in paths.files_below(root) if not any(part.startswith(".") for part in f.parts)]
    files = [f for f in listed if f.suffix.lower() in IMAGES]
    names = sorted({f.parts[0] for f in files if len(f.parts) > 1})
    loose = [f for f in files if len(f.parts) == 1]
    if not files:
        raise UserError(f"no images in {root}; looked for files ending in {', '.join(IMAGES)}")
    if names and loose:
        raise UserError(f"{root} has both class directories and loose images such as {loose[0]}; move the images into a class")
    chosen = [f for f in files if (zlib.crc32(f.as_posix().encode()) < held_out * 2**32) == (split == "test")]
    if not chosen:
        raise UserError(f"none of the {len(files)} images in {root} falls into the {split} split; "
                        f"change held_out, now {held_out}")
    label = np.array([names.index(f.parts[0]) for f in chosen], np.int32) if names else None

    kept = {name: lookup({"text": captions.FIELD}, name, "field of a folder") for name in fields}
    caption = captions.of_folder(root, chosen, listed) if fields else None

    def picture(file: PurePosixPath, data: Optional[bytes]) -> np.ndarray:
        from PIL import Image, ImageOps

        try:
            with Image.open(os.path.join(root, file) if data is None else io.BytesIO(data)) as image:
                upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
                return np.asarray(square(upright, image_size)).reshape(image_size, image_size, channels)
        except Exception as e:  # Pillow's decoders raise many kinds
            reason = str(e).split(" <_io.")[0]
            raise UserError(f"cannot read the image {os.path.join(root, file)}: {reason}; replace or remove it") from e

    def read(ids):
        found = [chosen[i] for i in ids]
        try:
            data = paths.read_all([os.path.join(root, f) for f in found]) if remote else [None] * len(found)
        except FileNotFoundError as e:
            raise UserError(f"{e.filename} is there no more; put it back, or start again without it") from e
        batch = {"image": np.stack(list(map(picture, found, data)))}
        if caption is not None:
            batch["text"] = caption(found)
        return batch if label is None else {**batch, "class": label[np.asarray(ids)]}

    shape = (image_size, image_size, channels)
    source = Source(PurePosixPath(root).name, shape, len(names) or None, tuple(names), len(chosen), read, kept)
    return cached(source) if cache else source


SOURCES = {"digits": digits, "folder": folder, "shapes": shapes, "tfds": tfds}
