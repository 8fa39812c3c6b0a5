"""Where image sets in the TFDS layout lie: DIR/name[/config]/version, with a dataset_info.json in it; DIR may be in a bucket."""
import os
import re
from pathlib import Path
from typing import Optional, Sequence, Tuple, Union

from ldm_jax import paths
from ldm_jax.types import UserError

NAME = re.compile(r"([a-z0-9_]+(?:/[\w.-]+)?)(?::(\d+\.\d+\.\d+))?")
VERSION = re.compile(r"\d+\.\d+\.\d+")

DataDir = Union[None, str, Sequence[str]]


def data_dirs(data_dir: DataDir = None) -> Tuple[Path, ...]:
    """Where sets are looked for, in order: `data_dir`, one or several; without it $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    if not data_dir:
        data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return tuple(_path(d) for d in ([data_dir] if isinstance(data_dir, (str, os.PathLike)) else data_dir))


def _path(directory) -> Path:
    if not paths.is_remote(directory):
        return Path(directory).expanduser()
    from etils import epath

    paths.isdir(directory)  # says in one line what keeps the bucket from being read
    return epath.Path(directory)


def find(name: str, dirs: Sequence[Path]) -> Optional[Path]:
    """The newest prepared version of `name` in the first of `dirs` that has one, or None.

    Raises:
      UserError: `name` is no set's name, leaves out the configuration, or its directory holds no description of the set.
    """
    match = NAME.fullmatch(name)
    if not match:
        raise UserError(f"{name!r} is not the name of a data set; give name, name/config or name:version, such as cifar10")
    for root in (d / match[1] for d in dirs):
        inside = sorted(d.name for d in root.iterdir() if d.is_dir()) if root.is_dir() else []
        versions = [d for d in inside if VERSION.fullmatch(d) and match[2] in (None, d)]
        if versions:
            found = root / max(versions, key=lambda v: [int(part) for part in v.split(".")])
            if not (found / "dataset_info.json").is_file():
                raise UserError(f"{found} is damaged: it has no dataset_info.json\nremove it, and {name} can be prepared again")
            return found
        configs = [d for d in inside if any(VERSION.fullmatch(p.name) for p in (root / d).iterdir())]
        if configs and "/" not in name:
            raise UserError(f"{name} has configurations; choose from: {', '.join(f'{name}/{c}' for c in configs)}")
    return None
