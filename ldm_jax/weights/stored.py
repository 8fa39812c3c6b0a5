"""Safetensors files tensor by tensor: read where it is asked for, written as it is made. (`files` reads whole files of any kind.)

The format: eight bytes, the length of a header as a little-endian integer; the header, JSON from each tensor's name to its
dtype, shape and the bytes [start, end) of its values behind the header; the values.
"""
import dataclasses
import json
import math
import os
import struct
from typing import Any, Dict, Mapping, Optional, Tuple

import ml_dtypes
import numpy as np

from ldm_jax import paths
from ldm_jax.types import UserError

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
          "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
HEADER = 2**27  # bytes that a header may have, far above those in use


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: numpy.asarray reads it, and nothing else does."""
    path: str
    shape: Tuple[int, ...]
    dtype: Any
    offset: int

    def __array__(self, dtype: Any = None, copy: Optional[bool] = None) -> np.ndarray:
        array = np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.offset).reshape(self.shape)
        return array if dtype is None else array.astype(dtype, copy=False)


def open_safetensors(path: str) -> Dict[str, Stored]:
    """The tensors of a file by name, none of them read yet.

    Raises:
      UserError: for a file that is missing, cut short, damaged, or holds numbers of an unknown kind.
    """
    path = paths.expand(path)
    if not paths.isfile(path):
        raise UserError(f"no file {path!r}; give the path of a file of weights")
    try:
        return _open(paths.local(path))
    except UserError as e:
        raise UserError(f"cannot read {path!r}: {e}") from e
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as e:
        raise UserError(f"cannot read {path!r}: cut short, damaged or no safetensors file "
                        f"({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no reason given'})") from e


def _open(path: str) -> Dict[str, Stored]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        if length > min(HEADER, size - 8):
            raise UserError(f"its header should have {length} bytes and the file has {size}: cut short or damaged")
        header = json.loads(file.read(length))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{name!r} is of dtype {entry['dtype']}; convert it to one of {', '.join(DTYPES)}")
        dtype, shape, (start, end) = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
            raise UserError(f"{name!r} has a negative size or place: damaged")
        if end - start != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{name!r} has {end - start} bytes for a {entry['dtype']} array of shape {shape}: damaged")
        if 8 + length + end > size:
            raise UserError(f"{name!r} ends at byte {8 + length + end} of a file of {size} bytes: cut short or damaged")
        tensors[name] = Stored(path, shape, dtype, 8 + length + start)
    return tensors


def read_metadata(path: str) -> Dict[str, str]:
    """The words that a file which `open_safetensors` can open says about itself, by name."""
    with open(paths.local(paths.expand(path)), "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0])).get("__metadata__") or {}


def write_safetensors(path: str, arrays: Mapping[str, Any], metadata: Mapping[str, str] = {}) -> None:
    """Write arrays to a file, one at a time, in the order of their names; it appears under its name once it is whole."""
    arrays, header, end = dict(sorted(arrays.items())), {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, array in arrays.items():
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
        header[name] = {"dtype": NAMES[np.dtype(array.dtype)], "shape": list(array.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of eight
    with paths.new_file(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())
