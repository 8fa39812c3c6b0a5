"""Fetches CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST and writes them in the official TFDS layout, without TensorFlow.

    python -m ldm_jax.data.prepare --name=cifar10 [--data_dir=DIR] [--archive=FILE_OR_DIRECTORY]

The official builder of each set decides names, features, splits, keys (so the order of the records) and where the data
comes from; only its reader is replaced, because it yields arrays, which TFDS encodes with TensorFlow alone. Here the
images are handed over as PNG bytes: the same pixels, losslessly.

Every file fetched or handed in is compared with the SHA-256 that TFDS registers for it. The set appears under its final name in
one rename, after everything has been written, so a preparation that was killed leaves nothing that looks prepared.
"""
import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, Iterator, Mapping, Optional, Tuple, Union

import numpy as np

from ldm_jax import paths
from ldm_jax.data.directories import data_dirs, find
from ldm_jax.types import UserError, lookup

Examples = Iterator[Tuple[int, Mapping[str, Any]]]  # key and features

CONNECT_S, READ_S = 10, 30  # how long a server may take to answer, and to send the next bytes


def command(name: str, data_dir: Union[str, Path], archive: Optional[str] = None) -> str:
    """The command that prepares a set by hand."""
    return f"python -m ldm_jax.data.prepare --name={name} --data_dir={data_dir}" + (f" --archive={archive}" if archive else "")


def _png(image: np.ndarray) -> bytes:
    """uint8 [H, W, C], C 1 or 3, as the bytes of a PNG file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(out, format="png")
    return out.getvalue()


def _cifar_examples(builder: Any, split_prefix: str, filepaths: Iterator[str]) -> Examples:
    """Records of the CIFAR binary files: one byte per label, then 3 x 32 x 32 bytes, channel by channel."""
    keys = builder._cifar_info.label_keys
    index = 0
    for path in filepaths:
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
        if not len(data) or len(data) % (len(keys) + 3072):
            raise UserError(f"{Path(path).name} has {len(data)} bytes, no whole number of records of {len(keys) + 3072}")
        for row in data.reshape(-1, len(keys) + 3072):
            image = row[len(keys):].reshape(3, 32, 32).transpose(1, 2, 0)
            yield index, {**dict(zip(keys, map(int, row))), "id": f"{split_prefix}{index:05d}", "image": _png(image)}
            index += 1


def _idx(path: Union[str, Path]) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes: 0, 0, 8, rank, then rank big-endian 32-bit sizes, then the values."""
    data = gzip.decompress(Path(path).read_bytes())
    rank = data[3] if len(data) > 3 and data[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(data, ">i4", rank, 4) if len(data) >= 4 + 4 * rank else []
    if not rank or len(data) - 4 - 4 * rank != np.prod(shape):
        raise UserError(f"{Path(path).name} is not an IDX file of bytes, or it is cut short")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _mnist_examples(builder: Any, num_examples: int, data_path: str, label_path: str) -> Examples:
    """Records of a pair of IDX files, images [n, 28, 28] and labels [n]. (How many they hold, their checksums settle.)"""
    images, labels = _idx(data_path), _idx(label_path)
    if images.shape != (len(labels), 28, 28):
        raise UserError(f"{Path(data_path).name} holds {images.shape} values for the {labels.shape} of {Path(label_path).name}; "
                        f"images must be [n, 28, 28]")
    for index, (image, label) in enumerate(zip(images, labels)):
        yield index, {"image": _png(image[..., None]), "label": int(label)}


OFFICIAL = {"cifar10": _cifar_examples, "cifar100": _cifar_examples, "mnist": _mnist_examples, "fashion_mnist": _mnist_examples}


def registered(name: str) -> Mapping[str, str]:
    """URL -> SHA-256 of the set's official files, from TFDS."""
    import tensorflow_datasets as tfds_lib

    return {url: info.checksum for url, info in tfds_lib.builder_cls(name).url_infos.items()}


def _check(path: Path, checksum: str, what: str) -> Path:
    with open(path, "rb") as f:
        actual = hashlib.file_digest(f, "sha256").hexdigest()
    if actual != checksum:
        raise UserError(f"{what} is incomplete or another file: its SHA-256 is {actual[:16]}..., "
                        f"that of the official file {checksum[:16]}...")
    return path


def _download(url: str, to: Path, checksum: str) -> Path:
    """Fetch `url` into the file `to`, which appears only when complete and right."""
    import requests
    from tqdm import tqdm

    to.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=to.name + ".", suffix=".part", dir=to.parent)
    try:
        with open(handle, "wb") as f, requests.get(url, stream=True, timeout=(CONNECT_S, READ_S)) as response:
            response.raise_for_status()
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=to.name, disable=None) as bar:
                for block in response.iter_content(2**18):
                    f.write(block)
                    bar.update(len(block))
        _check(Path(part), checksum, f"what {url} gave")
        os.replace(part, to)
    finally:
        Path(part).unlink(missing_ok=True)
    return to


def _download_all(name: str, root: Path) -> Mapping[str, Path]:
    """URL -> file under root/downloads/name, checked; those of an earlier try are kept."""
    import requests

    checksums, files = registered(name), {}
    for url, checksum in checksums.items():
        to = root / "downloads" / name / _file_name(url)
        with contextlib.suppress(OSError, UserError):  # not there, or of another version
            files[url] = _check(to, checksum, str(to))
            continue
        try:
            files[url] = _download(url, to, checksum)
        except requests.RequestException as e:
            errno = re.findall(r"\[Errno -?\d+\] [^'\")]*", str(e))
            reason = errno[-1] if errno else str(e) if isinstance(e, requests.HTTPError) else type(e).__name__
            raise UserError(f"{url} could not be downloaded ({reason})\nwhere there is a network fetch "
                            f"{', '.join(map(_file_name, checksums))}, then run: "
                            f"{command(name, root, 'FILE_OR_DIRECTORY')}") from e
    return files


def _find_all(name: str, archive: Path) -> Mapping[str, Path]:
    """URL -> file at or in `archive`, checked."""
    checksums = registered(name)
    alone = archive.is_file() and len(checksums) == 1
    files = {url: archive if alone else archive / _file_name(url) for url in checksums}
    for url, path in files.items():
        if not path.is_file():
            raise UserError(f"no file {path}; the archive given must be, or be the directory of, the official file from {url}")
    return {url: _check(path, checksums[url], str(path)) for url, path in files.items()}


def _file_name(url: str) -> str:
    return url.rsplit("/", 1)[1]


@dataclasses.dataclass(frozen=True)
class _Files:
    """What the official builders ask for their files: download_and_extract(URL, or names -> URLs) -> paths alike."""
    paths: Mapping[str, Path]
    scratch: Path

    def download_and_extract(self, urls):
        if isinstance(urls, Mapping):
            return {key: self.download_and_extract(url) for key, url in urls.items()}
        path = self.paths[urls]
        if not urls.endswith(".tar.gz"):
            return str(path)  # gzipped files are read as they are
        try:
            with tarfile.open(path, "r:gz") as tar:
                _unpack(tar, self.scratch)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise UserError(f"{path} cannot be unpacked: {str(e).splitlines()[0]}") from e
        return str(self.scratch)


def _unpack(tar: tarfile.TarFile, into: Path) -> None:
    """The plain files of an archive, none of them outside `into`. (The filter of `extractall` is missing in Python 3.11.0 to 3.11.3.)"""
    for member in tar:
        if member.isfile():
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise tarfile.TarError(f"{member.name} would lie outside of the archive's directory")
            target = into / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(target, "wb") as f:
                shutil.copyfileobj(source, f)


def _builder(name: str, files: _Files, root: Path):
    """The official builder of the set with another source of files and another reader."""
    import tensorflow_datasets as tfds_lib

    official, examples = tfds_lib.builder_cls(name), OFFICIAL[name]

    class Prepared(official, skip_registration=True):
        def _split_generators(self, dl_manager):
            return super()._split_generators(files)

        def _generate_examples(self, *args, **kwargs):
            return examples(self, *args, **kwargs)

    Prepared.name, Prepared.__module__ = name, official.__module__  # both are written into the set's description
    return Prepared(data_dir=str(root), file_format="array_record")


def prepare(name: str, data_dir: Union[None, str, Path] = None, *, archive: Union[None, str, Path] = None) -> Path:
    """Write the set under `data_dir` (see `data_dirs`), unless it is there; returns its directory.

    Args:
      archive: the official file, or the directory that holds the official files, fetched by hand. None: download them.

    Raises:
      UserError: a name that is not in OFFICIAL, a file that is missing or not the official one, a directory that cannot
        be written.
    """
    lookup(OFFICIAL, name, "data set to prepare")
    root = data_dirs(data_dir)[-1]
    if paths.is_remote(root):
        raise UserError(f"cannot prepare {name} in {root}; prepare it in a directory of this machine, then: "
                        f"gcloud storage cp -r DIR/{name} {root}/")
    found = find(name, [root])
    if found:
        return found
    try:
        files = _find_all(name, Path(archive).expanduser()) if archive else _download_all(name, root)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"preparing.{name}.", dir=root) as scratch:
            with contextlib.redirect_stdout(sys.stderr):  # TFDS announces itself on stdout
                _builder(name, _Files(files, Path(scratch)), root).download_and_prepare(download_dir=scratch)
    except OSError as e:
        if not find(name, [root]):  # where another process finished first, its result is as good
            raise UserError(f"cannot prepare {name} in {root}: {e}; free space there or choose another --data_dir") from e
    if not archive:
        shutil.rmtree(root / "downloads" / name, ignore_errors=True)
    return find(name, [root])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldm_jax.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help=f"one of: {', '.join(OFFICIAL)}")
    parser.add_argument("--data_dir", help="where to write; without it $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--archive", help="the official file, or the directory of the official files, where there is no network")
    args = parser.parse_args(argv)
    try:
        print(prepare(args.name, args.data_dir, archive=args.archive))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
