"""Files of weights as numpy arrays: safetensors, npz, and what torch.save writes, without torch and without executing anything.

torch.save writes a pickle of nested containers in which a tensor is a call of a rebuilding function on a storage, and a storage
is a persistent id (kind, type, key, place, count). Two formats hold it:

    zip         NAME/data.pkl, and NAME/data/KEY with the bytes of each storage                     (torch 1.6 and later)
    legacy      five pickles: magic number, version, machine, the object, the list of keys;
                then for each key its count as int64, and its bytes                                 (before, and still on request)

A pickle is a program, so it is run with a table in the place of imports: `_pickled` and the storage types are all it can name.
Old files rebuild with _rebuild_tensor and wrap in Parameter, later ones rebuild with _rebuild_tensor_v2.
"""
import collections
import dataclasses
import functools
import io
import os
import pickle
import struct
import zipfile
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import ml_dtypes  # before safetensors, which finds bfloat16 in numpy only once this has put it there
import numpy as np
import safetensors.numpy

from ldm_jax.types import UserError

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the legacy format

STORAGES = {"DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
            "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
            "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_, "ComplexFloatStorage": np.complex64,
            "ComplexDoubleStorage": np.complex128}
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")


def read_arrays(path: str) -> Dict[str, np.ndarray]:
    """The arrays in a file of weights, by name, in their own dtypes (bfloat16 is ml_dtypes').

    Nested dicts, lists and tuples of a torch file are flattened, their keys and indices joined with ".": an array of the
    "state_dict" in a checkpoint is "state_dict.NAME", a lone tensor is "". All else in it is left out. Arrays of a torch file may
    share memory, as the tensors did, and are read-only.

    Args:
      path: .safetensors, .npz, or a torch file in either format: .pt, .pth, .ckpt, .bin.

    Raises:
      UserError: for a file that is missing, of another kind, cut short or damaged, and for a torch file that needs more than
        tensors and plain containers.
    """
    path = os.path.expanduser(os.fspath(path))
    reader = READERS.get(os.path.splitext(path)[1].lower())
    if reader is None:
        raise UserError(f"cannot tell what {path!r} is; files of weights end in {', '.join(READERS)}")
    if not os.path.isfile(path):
        raise UserError(f"no file {path!r}; give the path of a file of weights")
    try:
        return reader(path)
    except UserError as e:
        raise UserError(f"cannot read {path!r}: {e}") from e
    except Exception as e:  # damage shows itself in many kinds
        raise UserError(f"cannot read {path!r}: cut short, damaged or of another kind than its name says "
                        f"({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no reason given'})") from e


def _npz(path: str) -> Dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    unknown = [name for name, a in arrays.items() if a.dtype.kind == "V"]
    if unknown:
        raise UserError(f"{unknown[0]!r} has a dtype that .npz does not keep, such as bfloat16; save it as .safetensors")
    return arrays


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """A storage by its key: `count` values of a type in STORAGES; `view` (start, count) is the part of it that is meant."""
    type: str
    key: str
    count: int
    view: Optional[Tuple[int, int]] = None

    def __setstate__(self, state: Any) -> None:
        """What a pickle wants to set after the fact is ignored."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor as the pickle has it: all but the values. offset and stride are in values, not bytes."""
    storage: _Storage
    offset: int
    size: Tuple[int, ...]
    stride: Tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        """As above: (requires_grad, volatile, hooks) of a Parameter in old files."""


def _pickled() -> Mapping[str, Any]:
    """Everything that a pickle may name, besides the storage types. Made anew for each, which could otherwise alter it."""
    def tensor(storage, offset, size, stride, *rest):
        return _Tensor(storage, offset, size, stride)

    def parameter(data, *rest):
        return data

    class Parameter:
        def __new__(cls, data, *rest):
            return data

    return {"torch._utils._rebuild_tensor": tensor, "torch._utils._rebuild_tensor_v2": tensor,
            "torch._utils._rebuild_parameter": parameter, "torch.nn.parameter.Parameter": Parameter, "torch.Size": tuple,
            "collections.OrderedDict": collections.OrderedDict, "builtins.set": set, "__builtin__.set": set}


class _Unpickler(pickle.Unpickler):
    """Builds containers, `_Tensor`s and `_Storage`s; `types` collects the type of each storage by its key."""
    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8")
        self.names, self.types = _pickled(), {}

    def find_class(self, module: str, name: str) -> Any:
        if module in STORAGE_MODULES and name in STORAGES:
            return name
        if f"{module}.{name}" in self.names:
            return self.names[f"{module}.{name}"]
        raise UserError(f"it wants {module}.{name}, and only tensors in plain containers are read; nothing of it was executed. "
                        f"Save its state_dict alone, or as .safetensors")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, *fields = pid
        if kind != "storage":
            raise UserError(f"it holds a whole {kind}, not its weights; save its state_dict instead")
        type_, key, _, count, *view = fields
        if type_ not in STORAGES:
            raise UserError(f"a storage of the unknown type {type_!r}")
        self.types[key] = type_
        return _Storage(type_, key, count, tuple(view[0][1:]) if view and view[0] is not None else None)


def _array(tensor: _Tensor, data: bytes) -> np.ndarray:
    """The tensor's view of the bytes of its storage; numpy refuses one that reaches outside them."""
    storage, dtype = tensor.storage, np.dtype(STORAGES[tensor.storage.type])
    if len(data) < storage.count * dtype.itemsize:
        raise UserError(f"storage {storage.key} has {len(data)} bytes of {storage.count * dtype.itemsize}: cut short or damaged")
    start, count = storage.view or (0, storage.count)
    buffer = memoryview(data)[start * dtype.itemsize:(start + count) * dtype.itemsize]
    if len(tensor.size) != len(tensor.stride) or min((start, count, tensor.offset, *tensor.size, *tensor.stride)) < 0:
        raise UserError(f"a tensor of size {tensor.size}, stride {tensor.stride} and offset {tensor.offset}: damaged")
    if 0 in tensor.size:
        return np.zeros(tensor.size, dtype)
    try:
        return np.ndarray(tensor.size, dtype, buffer, tensor.offset * dtype.itemsize, [n * dtype.itemsize for n in tensor.stride])
    except (TypeError, ValueError) as e:
        raise UserError(f"a tensor of size {tensor.size}, stride {tensor.stride} and offset {tensor.offset} reaches outside its "
                        f"storage of {len(buffer) // dtype.itemsize} values: damaged") from e


def _flatten(tree: Any, data_of: Callable[[str], bytes]) -> Dict[str, np.ndarray]:
    arrays = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, _Tensor):
            if name in arrays:
                raise UserError(f"it has two arrays of the name {name!r}")
            arrays[name] = _array(value, data_of(value.storage.key))
        elif isinstance(value, (dict, list, tuple)):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                visit(f"{name}.{key}" if name else str(key), child)

    visit("", tree)
    return arrays


def _zipped(path: str) -> Dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        roots = [n.removesuffix("/data.pkl") for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise UserError("it is a zip archive, but not one of torch.save: it has no NAME/data.pkl")
        root = roots[0]
        if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
            raise UserError("it was written on a big-endian machine; save it again on another")
        data = functools.cache(lambda key: archive.read(f"{root}/data/{key}"))
        return _flatten(_Unpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load(), data)


def _legacy(path: str) -> Dict[str, np.ndarray]:
    with open(path, "rb") as file:
        if _Unpickler(file).load() != MAGIC or _Unpickler(file).load() != VERSION:
            raise UserError("it is in neither of the formats of torch.save")
        _Unpickler(file).load()  # the machine: storages are little-endian whatever it says
        unpickler = _Unpickler(file)
        tree, keys, data = unpickler.load(), _Unpickler(file).load(), {}
        end = os.fstat(file.fileno()).st_size
        for key in keys:
            count, = struct.unpack("<q", file.read(8))
            size = count * np.dtype(STORAGES[unpickler.types[key]]).itemsize
            if not 0 <= size <= end - file.tell():
                raise UserError(f"storage {key} has {end - file.tell()} bytes of {size}: cut short or damaged")
            data[key] = file.read(size)
        return _flatten(tree, data.__getitem__)


def _torch(path: str) -> Dict[str, np.ndarray]:
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    return (_zipped if zipped else _legacy)(path)


READERS = {".safetensors": safetensors.numpy.load_file, ".npz": _npz,
           ".pt": _torch, ".pth": _torch, ".ckpt": _torch, ".bin": _torch}
