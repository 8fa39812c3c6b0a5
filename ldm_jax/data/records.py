"""Image-classification sets in the TFDS layout, read from array_record files without TensorFlow.

A set lies in DIR/name[/config]/version with its dataset_info.json; the newest version found is read, and the directory alone
says what is in it, so a set that TFDS itself does not know is read as well.
"""
import difflib
import io
from pathlib import Path
from typing import Callable, Optional, Sequence

import numpy as np

from ldm_jax import paths
from ldm_jax.data.base import Source, cached, square
from ldm_jax.data.directories import DataDir, data_dirs, find
from ldm_jax.types import UserError


def _prepare(name: str, dirs: Sequence[Path], download: bool) -> Path:
    """Prepare a set that is in none of `dirs` in the last of them, or say how."""
    import tensorflow_datasets as tfds_lib

    from ldm_jax.data import prepare

    looked = ", ".join(map(str, dirs))
    base = name.split(":")[0]
    if base in prepare.OFFICIAL and ":" not in name:
        if not download:
            raise UserError(f"{name} is not prepared in {looked}\nprepare it with: {prepare.command(name, dirs[-1])}")
        if paths.is_remote(dirs[-1]):
            raise UserError(f"{name} is not prepared in {looked}\nprepare it on this machine and copy it there: "
                            f"{prepare.command(name, 'DIR')} && gcloud storage cp -r DIR/{base} {dirs[-1]}/")
        try:
            return prepare.prepare(name, dirs[-1])
        except UserError as e:
            raise UserError(f"{name} is not in {looked}; {e}") from e
    known = tfds_lib.list_builders(with_community_datasets=False)
    if base.split("/")[0] in known:
        raise UserError(f"{name} is not prepared in {looked}\nprepare it where TensorFlow is installed: "
                        f"tfds build {name} --file_format=array_record --data_dir={dirs[-1]}")
    near = difflib.get_close_matches(base, known, 3)
    raise UserError(f"unknown data set {name!r}: it is not in {looked}, and TFDS has none of that name\n"
                    + (f"did you mean: {', '.join(near)}?" if near else "names: https://www.tensorflow.org/datasets/catalog"))


def _decode_pillow(data: bytes, mode: str) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if mode == "L" else pixels


def _decoder(channels: int) -> Callable[[bytes], np.ndarray]:
    """encoded image -> uint8 [H, W, channels], by OpenCV where it is installed and else, more slowly, by Pillow."""
    try:
        import cv2
    except ImportError:
        return lambda data: _decode_pillow(data, "L" if channels == 1 else "RGB")

    kind = (cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR) | cv2.IMREAD_IGNORE_ORIENTATION

    def decode(data: bytes) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), kind)
        if image is None:
            raise ValueError("a record holds no image")
        return image[..., None] if channels == 1 else image[..., ::-1]
    return decode


def tfds(split: str = "train", *, name: str, data_dir: DataDir = None, image_size: Optional[int] = None, download: bool = True,
         cache: bool = True) -> Source:
    """An image set in the TFDS layout, such as cifar10, mnist or one of your own.

    Args:
      split: "train", "test" or any TFDS expression over the set's splits, such as "train[:90%]".
      name: name, name/config or name:version.
      data_dir: a directory or several to look in, in that order; see `data_dirs`. A set found in none is prepared in the last.
      image_size: scale and centre-crop to this; needed where the set's images differ in size.
      download: may fetch and prepare a set that is missing (see prepare.py for which).
      cache: keep decoded images in memory where they fit; see `cached`.

    Raises:
      UserError: a set that is missing or damaged, an unknown split, images that are not uint8 of 1 or 3 channels.
    """
    import tensorflow_datasets as tfds_lib

    if image_size is not None and image_size < 1:
        raise UserError(f"image_size {image_size} must be positive")
    dirs = data_dirs(data_dir)
    path = find(name, dirs) or _prepare(name, dirs, download)

    def damaged(e: Exception) -> UserError:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        return UserError(f"the data set in {path} is damaged: {reason}\nremove that directory and prepare {name} again")

    try:
        builder = tfds_lib.builder_from_directory(paths.local_directory(path))  # its files are opened by their names
        info = builder.info
        splits, features = info.splits, dict(info.features)
    except Exception as e:  # the library raises whatever its parsers raise
        raise damaged(e) from e
    if "array_record" not in str(info.file_format.value):
        raise UserError(f"{path} holds {info.file_format.value} files, which need TensorFlow\nconvert them where that is: "
                        f"tfds convert_format --dataset_dir={path} --out_file_format=array_record --out_path=DIR")
    try:
        size = splits[split].num_examples
    except Exception as e:
        raise UserError(f"unknown split {split!r} of {name}; choose from: {', '.join(splits)}, "
                        f"or a part such as 'train[:90%]'") from e
    if not size:
        raise UserError(f"split {split!r} of {name} in {path} is empty")

    image_key = next((k for k, f in features.items() if isinstance(f, tfds_lib.features.Image)), None)
    label_key = next((k for k in ("label", *features) if isinstance(features.get(k), tfds_lib.features.ClassLabel)), None)
    height, width, channels = features[image_key].shape if image_key else (None, None, None)
    if channels not in (1, 3) or np.dtype(features[image_key].np_dtype) != np.uint8:
        raise UserError(f"{name} has no uint8 images of 1 or 3 channels; its features are: {', '.join(features)}")
    if image_size is None and None in (height, width):
        raise UserError(f"the images of {name} differ in size; give image_size")
    shape = (image_size or height, image_size or width, channels)
    labels = features[label_key] if label_key else None

    try:
        records = builder.as_data_source(split, decoders={image_key: tfds_lib.decode.SkipDecoding()})
        records.__getitems__(sorted({0, size - 1}))  # opens the first and the last file, so that most damage shows now
    except Exception as e:
        raise damaged(e) from e

    decode = _decoder(channels)

    def picture(data: bytes) -> np.ndarray:
        image = decode(data)
        if image_size and image.shape != shape:
            image = _fit(image, image_size)
        if image.shape != shape:
            raise ValueError(f"an image of shape {image.shape} among those of {shape}")
        return image

    def read(ids):
        try:
            rows = records.__getitems__([int(i) for i in ids])
            batch = {"image": np.stack([picture(row[image_key]) for row in rows])}
        except Exception as e:
            raise damaged(e) from e
        return {**batch, "class": np.array([row[label_key] for row in rows], np.int32)} if labels else batch

    source = Source(name, shape, labels.num_classes if labels else None, tuple(labels.names) if labels else (), size, read)
    return cached(source) if cache else source


def _fit(image: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(square(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), size)).reshape(size, size, -1)
