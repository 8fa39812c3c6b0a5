"""The one door to file systems: paths of this machine, and gs://BUCKET/... on Google Cloud Storage through gcsfs.

A bucket holds objects, which appear whole or not at all, and are neither appended to nor renamed. It has no directories: one is there
where the name of an object begins with it. Who needs a file of this machine (a map of weights, records) gets a copy, see `local`.

For both kinds of path FileNotFoundError says that nothing is there to be read. Whatever else keeps a bucket from being read or written is
told in one line, a UserError; on this machine it is the OSError that it always is.
"""
import contextlib
import errno
import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Iterator, List, Optional, Sequence, Union

from ldm_jax.types import UserError

PathLike = Union[str, os.PathLike]
SCHEME = "gs://"
CACHE = os.path.join("~", ".cache", "ldm_jax", "files")  # copies of what lies in buckets


def is_remote(path: PathLike) -> bool:
    """Whether a path is not one of this machine.

    Raises:
      UserError: for a URL of another kind than gs://BUCKET/....
    """
    path = os.fspath(path)
    if "://" in path and not path.startswith(SCHEME):
        raise UserError(f"{path!r} cannot be opened; paths are those of this machine, or {SCHEME}BUCKET/...")
    return path.startswith(SCHEME)


def expand(path: PathLike) -> str:
    """The path as a string, ~ being the home directory."""
    return os.path.expanduser(os.fspath(path))


def connect(path: str) -> Any:
    """The file system of gs://, as Orbax will find it too.

    Raises:
      UserError: where gcsfs is not installed.
    """
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks another service about each bucket, by gRPC
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise UserError(f'{path!r} is on Google Cloud Storage, which needs gcsfs: pip install "ldm_jax[gcs]"') from error
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for each error that it also raises
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)  # tensorstore and other machines write there too
    return fsspec.filesystem("gs")


@contextlib.contextmanager
def _asking(path: str, what: str) -> Iterator[Any]:
    """`connect(path)`, with the errors of the file's head."""
    try:
        yield connect(path)
    except UserError:
        raise
    except FileNotFoundError as error:
        if what == "write":
            raise UserError(f"cannot write {path!r}: there is no such bucket; create it first, or give another path") from error
        raise FileNotFoundError(errno.ENOENT, "no such object", path) from error
    except Exception as error:  # of gcsfs, aiohttp, google.auth and the disk
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        refused = (getattr(error, "code", None) in (401, 403, "401", "403") or lines[0].startswith("Forbidden")
                   or type(error).__module__.startswith("google.auth"))
        way_out = "; give this machine's account access to the bucket, or: gcloud auth application-default login" if refused else ""
        raise UserError(f"cannot {what} {path!r}: {lines[-1].strip()[:200]}{way_out}") from error


def _kind(path: str) -> Optional[str]:
    """"file", "directory", or None where nothing is there, of a remote path."""
    try:
        with _asking(path, "read") as store:
            return store.info(path)["type"]
    except FileNotFoundError:
        return None


def exists(path: PathLike) -> bool:
    return _kind(os.fspath(path)) is not None if is_remote(path) else os.path.exists(path)


def isfile(path: PathLike) -> bool:
    return _kind(os.fspath(path)) == "file" if is_remote(path) else os.path.isfile(path)


def isdir(path: PathLike) -> bool:
    return _kind(os.fspath(path)) == "directory" if is_remote(path) else os.path.isdir(path)


def listdir(path: PathLike) -> List[str]:
    """The names in a directory, sorted."""
    if not is_remote(path):
        return sorted(os.listdir(path))
    with _asking(os.fspath(path), "read") as store:
        names = {name.rstrip("/").rsplit("/", 1)[-1] for name in store.ls(path, detail=False) if not name.endswith("/")}
        return sorted(names)


def files_below(path: PathLike) -> List[PurePosixPath]:
    """The files in a directory and the directories in it, by their paths within it, sorted."""
    if not is_remote(path):
        root = Path(path)
        return sorted(PurePosixPath(f.relative_to(root).as_posix()) for f in root.rglob("*") if f.is_file())
    return sorted(PurePosixPath(name) for name in _objects(os.fspath(path)))


def _objects(path: str) -> Dict[str, Any]:
    """Name within a remote directory -> what the store says of the object."""
    with _asking(path, "read") as store:
        start = len(store._strip_protocol(path).rstrip("/")) + 1
        found = {name[start:]: info for name, info in store.find(path, detail=True).items() if name[start:] and not name.endswith("/")}
    if odd := [name for name in found if {"", ".", ".."} & set(name.split("/"))]:
        raise UserError(f"{path!r} has an object of the name {odd[0]!r}, which cannot be a file's; rename it")
    return found


def makedirs(path: PathLike) -> None:
    """Make a directory where there is none; in a bucket there is nothing to make."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


def read_bytes(path: PathLike) -> bytes:
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    with _asking(os.fspath(path), "read") as store:
        return store.cat_file(path)


def read_text(path: PathLike) -> str:
    """A file of UTF-8, its ends of line as they are."""
    return read_bytes(path).decode("utf-8")


def read_all(paths: Sequence[PathLike]) -> List[bytes]:
    """Several files; those in a bucket are asked for at once."""
    distinct = list(dict.fromkeys(map(os.fspath, paths)))
    if len(distinct) < 2 or not is_remote(distinct[0]):
        found = {path: read_bytes(path) for path in distinct}
    else:
        with _asking(distinct[0], "read") as store:
            parts = store.cat(distinct, on_error="return")
            found = {path: parts[store._strip_protocol(path)] for path in distinct}
        for path, part in found.items():
            if isinstance(part, Exception):
                with _asking(path, "read"):
                    raise part
    return [found[os.fspath(path)] for path in paths]


def write_bytes(path: PathLike, data: bytes) -> None:
    """Write a file, which appears whole or not at all."""
    path = os.fspath(path)
    if not is_remote(path):
        with open(f"{path}.tmp", "wb") as file:
            file.write(data)
        return os.replace(f"{path}.tmp", path)
    with _asking(path, "write") as store:
        store.pipe_file(path, data)


def write_text(path: PathLike, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def upload(source: str, path: str) -> None:
    """Copy a file of this machine to a remote path."""
    with _asking(path, "write") as store:
        store.put_file(source, path)


@contextlib.contextmanager
def new_file(path: str) -> Iterator[str]:
    """The name of a file of this machine to write; it is at `path` once the block has ended, and not at all after an error."""
    if not is_remote(path):
        yield f"{path}.partial"
        return os.replace(f"{path}.partial", path)
    with tempfile.TemporaryDirectory(prefix="ldm_jax-") as scratch:
        partial = os.path.join(scratch, os.path.basename(path))
        yield partial
        upload(partial, path)


@contextlib.contextmanager
def new_directory(path: str, last: str) -> Iterator[str]:
    """The name of an empty directory of this machine to fill; it is at `path` once the block has ended, and not at all after an error.

    last: a file in it without which it is not whole; it arrives in a bucket after the others.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="ldm_jax-") as scratch:
            yield scratch
            names = sorted((str(name) for name in files_below(scratch)), key=lambda name: (name == last, name))
            groups = (names[:-1], names[-1:])
            for group in filter(None, groups):
                with _asking(path, "write") as store:
                    store.put([os.path.join(scratch, name) for name in group], [f"{path.rstrip('/')}/{name}" for name in group])
        return
    partial = f"{path}.partial"  # one name, so that what a killed process left is gone with the next
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def local(path: PathLike) -> str:
    """A file of this machine that holds what is at `path`: itself, or a copy that is made once for each version of an object.

    Raises:
      FileNotFoundError: where there is no such object.
      UserError: where it cannot be read, or the copy not be written.
    """
    path = os.fspath(path)
    if not is_remote(path):
        return path
    with _asking(path, "read") as store:
        info = store.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
    return os.path.join(_copied(path.rsplit("/", 1)[0], {path.rsplit("/", 1)[1]: info}), path.rsplit("/", 1)[1])


def local_directory(path: PathLike) -> str:
    """The same of a directory with all that is in it."""
    return os.fspath(path) if not is_remote(path) else _copied(os.fspath(path), _objects(os.fspath(path)))


def _copied(root: str, objects: Dict[str, Any]) -> str:
    """A directory of this machine with copies of these objects, by their names below `root`."""
    versions = [(name, info["size"], str(info.get("generation") or info.get("etag"))) for name, info in sorted(objects.items())]
    directory = os.path.join(expand(CACHE), hashlib.sha256(repr((root, versions)).encode()).hexdigest()[:24])
    if os.path.isdir(directory):
        return directory
    with _asking(root, "copy") as store:
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=os.path.dirname(directory)) as partial:
            whole = os.path.join(partial, "whole")
            targets = [os.path.join(whole, *name.split("/")) for name in objects]
            for target in targets:
                os.makedirs(os.path.dirname(target), exist_ok=True)
            store.get([f"{root.rstrip('/')}/{name}" for name in objects], targets)
            with contextlib.suppress(OSError):  # where another process was first, its copy is as good
                os.rename(whole, directory)
    return directory
