"""JPEG as the line that a first stage is measured against: what it keeps of the same pictures in as many bytes."""
import io
from typing import Tuple

import numpy as np
from PIL import Image

_START_OF_SCAN = b"\xff\xda"


def compress(image: np.ndarray, quality: int) -> Tuple[int, np.ndarray]:
    """One uint8 image [H, W, C] as (bytes of its entropy-coded data, what is decoded from them).

    Headers and tables, some hundreds of bytes that do not depend on the picture, are not counted; Huffman tables are the
    picture's own, colours are halved in resolution, as JPEG encoders do by default.
    """
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "jpeg", quality=quality, optimize=True)
    data = file.getvalue()
    scan = data.index(_START_OF_SCAN) + 2
    header = int.from_bytes(data[scan:scan + 2], "big")
    return len(data) - scan - header - 2, np.asarray(Image.open(file)).reshape(image.shape)


def within(images: np.ndarray, budget: float) -> Tuple[float, np.ndarray]:
    """Each of the uint8 images [N, H, W, C] at the highest quality whose data fit in `budget` bytes, the lowest where none does.

    Returns the mean number of bytes that were used and the decoded images.
    """
    used, out = [], []
    for image in images:
        low, high, best = 2, 95, compress(image, 1)
        while low <= high:
            middle = (low + high) // 2
            size, again = compress(image, middle)
            if size <= budget:
                best, low = (size, again), middle + 1
            else:
                high = middle - 1
        used.append(best[0])
        out.append(best[1])
    return float(np.mean(used)), np.stack(out)
