"""Pictures for people: grids of images as PNG files."""
import io
import os
from typing import Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageOps

from ldm_jax import paths
from ldm_jax.types import UserError, writes_files

_SMALLEST = 48  # pixels; smaller images are enlarged by a whole factor so that they can be looked at


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint8, rounded to nearest; uint8 passes."""
    images = np.asarray(images)
    return images if images.dtype == np.uint8 else np.clip(np.rint(images * 255.0), 0, 255).astype(np.uint8)


def grid(rows: Sequence[np.ndarray], gap: int = 2) -> Image.Image:
    """One picture from rows of images [N, H, W, C] (uint8, or float in [0, 1]), C 1 or 3; rows may differ in length."""
    rows = [to_uint8(row) for row in rows]
    h, w, c = rows[0].shape[1:]
    factor = max(1, -(-_SMALLEST // max(h, w)))
    h, w = h * factor + gap, w * factor + gap
    sheet = np.full((len(rows) * h + gap, max(map(len, rows)) * w + gap, c), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            big = image.repeat(factor, 0).repeat(factor, 1)
            sheet[gap + y * h:y * h + h, gap + x * w:x * w + w] = big
    return Image.fromarray(sheet[..., 0] if c == 1 else sheet)


def save(path: str, rows: Sequence[np.ndarray], gap: int = 2) -> str:
    """Write `grid(rows, gap)` to `path`, which appears whole; returns the path. Of several processes the first writes."""
    if not writes_files():
        return path
    file = io.BytesIO()
    grid(rows, gap).save(file, format="png")
    paths.makedirs(os.path.dirname(path) or ".")
    paths.write_bytes(path, file.getvalue())
    return path


def read(path: str, size: Optional[Tuple[int, int]], channels: int) -> np.ndarray:
    """A file as uint8 [H, W, channels], scaled and cropped about its centre to `size` (H, W), or of its own size where that is None.

    Raises:
      UserError: for a file that is missing or no picture.
    """
    try:
        with Image.open(paths.local(paths.expand(path))) as image:
            image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except OSError as error:
        raise UserError(f"cannot read the picture {path!r}: {error}") from error
    if size is not None:
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image.height, image.width, channels)
