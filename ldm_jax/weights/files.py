"""Files of weights as numpy arrays: safetensors, npz, and what torch.save writes, without torch and without executing anything.

`open_arrays` reads each array where it is asked for, `read_arrays` all of them at once.

torch.save writes a pickle of nested containers in which a tensor is a call of a rebuilding function on a storage, and a storage
is a persistent id (kind, type, key, place, count). Two formats hold it:

    zip         NAME/data.pkl, and NAME/data/KEY with the bytes of each storage                     (torch 1.6 and later)
    legacy      five pickles: magic number, version, machine, the object, the list of keys;
                then for each key its count as int64, and its bytes                                 (before, and still on request)

A pickle is a program, so it is run with a table in the place of imports: `_pickled`, the storage types and INERT are all it can
name. Old files rebuild with _rebuild_tensor and wrap in Parameter, later ones rebuild with _rebuild_tensor_v2. Trainers leave
objects of their own beside the weights; those of INERT stand for nothing here: whatever is done to one gives another of the kind.
"""
import collections
import dataclasses
import functools
import io
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import ml_dtypes  # before safetensors, which finds bfloat16 in numpy only once this has put it there
import numpy as np
import safetensors.numpy

from ldm_jax import paths
from ldm_jax.types import UserError
from ldm_jax.weights.stored import open_safetensors

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the legacy format

STORAGES = {"DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
            "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
            "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_, "ComplexFloatStorage": np.complex64,
            "ComplexDoubleStorage": np.complex128}
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
INERT = re.compile(  # what a trainer leaves beside the weights: its callbacks, its config, numbers of numpy
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|omegaconf)\..+"
    r"|argparse\.Namespace|typing\.Any|numpy\.(dtype|ndarray|(core|_core)\.multiarray\.(scalar|_reconstruct))|_codecs\.encode"
    r"|torch\.(device|float64|float32|float16|bfloat16|int64)|pathlib\.(Pure)?(Posix|Windows)?Path"
    r"|(builtins|__builtin__)\.(dict|list|tuple|int|float|str|bool)")


def read_arrays(path: str) -> Dict[str, np.ndarray]:
    """The arrays in a file of weights, by name, in their own dtypes (bfloat16 is ml_dtypes').

    Nested dicts, lists and tuples of a torch file are flattened, their keys and indices joined with ".": an array of the
    "state_dict" in a checkpoint is "state_dict.NAME", a lone tensor is "". All else in it is left out. Arrays of a torch file may
    share memory, as the tensors did, and are read-only.

    Args:
      path: .safetensors, .npz, or a torch file in either format: .pt, .pth, .ckpt, .bin.

    Raises:
      UserError: for a file that is missing, of another kind, cut short or damaged, and for a torch file that needs more than
        tensors, plain containers and INERT.
    """
    return _guarded(path, READERS)


def open_arrays(path: str) -> Dict[str, Any]:
    """The same with each array in its file until numpy.asarray reads it; those of .npz are read at once. Errors are the same."""
    return _guarded(path, OPENERS)


def _guarded(path: str, readers: Mapping[str, Callable]) -> Dict[str, Any]:
    path = paths.expand(path)
    reader = readers.get(os.path.splitext(path)[1].lower())
    if reader is None:
        raise UserError(f"cannot tell what {path!r} is; files of weights end in {', '.join(readers)}")
    if not paths.isfile(path):
        raise UserError(f"no file {path!r}; give the path of a file of weights")
    try:
        return reader(paths.local(path))
    except UserError as e:
        raise e if repr(path) in str(e) else UserError(f"cannot read {path!r}: {e}") from e
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

    def mapping(*factory):
        return {}

    return {"torch._utils._rebuild_tensor": tensor, "torch._utils._rebuild_tensor_v2": tensor,
            "torch._utils._rebuild_parameter": parameter, "torch.nn.parameter.Parameter": Parameter, "torch.Size": tuple,
            "collections.OrderedDict": collections.OrderedDict, "collections.defaultdict": mapping, "builtins.set": set,
            "__builtin__.set": set}


def _inert() -> type:
    """A class whose objects take whatever a pickle does to them and keep nothing."""
    class Inert:
        def __new__(cls, *args, **options):
            return object.__new__(cls)

        def __init__(self, *args, **options):
            pass

        def ignored(self, *args):
            pass

        __setstate__ = __setitem__ = append = extend = add = update = ignored

        def __call__(self, *args):
            return self

    return Inert


class _Unpickler(pickle.Unpickler):
    """Builds containers, `_Tensor`s and `_Storage`s; `types` collects the type of each storage by its key."""
    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8")
        self.names, self.types, self.inert = _pickled(), {}, _inert()

    def find_class(self, module: str, name: str) -> Any:
        if module in STORAGE_MODULES and name in STORAGES:
            return name
        if f"{module}.{name}" in self.names:
            return self.names[f"{module}.{name}"]
        if INERT.fullmatch(f"{module}.{name}"):
            return self.inert
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


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A tensor in a torch file: numpy.asarray reads its values, and nothing else does.

    data_of: (key of a storage, start, end) -> those of its bytes.
    """
    tensor: _Tensor
    data_of: Callable[[str, int, int], Any]

    @property
    def shape(self) -> Tuple[int, ...]:
        return self.tensor.size

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(STORAGES[self.tensor.storage.type])

    def __array__(self, dtype: Any = None, copy: Optional[bool] = None) -> np.ndarray:
        tensor, own = self.tensor, self.dtype
        if 0 in tensor.size:
            return np.zeros(tensor.size, dtype or own)
        first = ((tensor.storage.view or (0, 0))[0] + tensor.offset) * own.itemsize
        try:
            data = self.data_of(tensor.storage.key, first, first + (_last(tensor) - tensor.offset + 1) * own.itemsize)
            array = np.ndarray(tensor.size, own, memoryview(data).toreadonly(), 0, [n * own.itemsize for n in tensor.stride])
        except UserError:
            raise
        except (OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as e:
            raise UserError(f"cannot read storage {tensor.storage.key} for a tensor of size {tensor.size}, stride {tensor.stride} "
                            f"and offset {tensor.offset}: damaged ({e})") from e
        return array if dtype is None else array.astype(dtype, copy=False)


def _last(tensor: _Tensor) -> int:
    """The place of the tensor's last value in its storage, or in the part of it that is meant."""
    return tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.size, tensor.stride))


def _check(tensor: _Tensor, size: int) -> None:
    """Raises UserError unless the tensor lies within its storage, and that within its `size` bytes in the file."""
    storage, width = tensor.storage, np.dtype(STORAGES[tensor.storage.type]).itemsize
    start, count = storage.view or (0, storage.count)
    if size < storage.count * width:
        raise UserError(f"storage {storage.key} has {size} bytes of {storage.count * width}: cut short or damaged")
    what = f"a tensor of size {tensor.size}, stride {tensor.stride} and offset {tensor.offset}"
    if len(tensor.size) != len(tensor.stride) or min((start, count, tensor.offset, *tensor.size, *tensor.stride)) < 0:
        raise UserError(f"{what}: damaged")
    if 0 not in tensor.size and (_last(tensor) >= count or (start + count) * width > size or math.prod(tensor.size) > 2**48):
        raise UserError(f"{what} reaches outside its storage of {count} values: damaged")


def _flatten(tree: Any, size_of: Callable[[str], int], data_of: Callable) -> Dict[str, Held]:
    arrays = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, _Tensor):
            if name in arrays:
                raise UserError(f"it has two arrays of the name {name!r}")
            _check(value, size_of(value.storage.key))
            arrays[name] = Held(value, data_of)
        elif isinstance(value, (dict, list, tuple)):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                visit(f"{name}.{key}" if name else str(key), child)

    visit("", tree)
    return arrays


def _zipped(path: str) -> Dict[str, Held]:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [n.removesuffix("/data.pkl") for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise UserError("it is a zip archive, but not one of torch.save: it has no NAME/data.pkl")
        root = roots[0]
        if f"{root}/byteorder" in entries and archive.read(f"{root}/byteorder") != b"little":
            raise UserError("it was written on a big-endian machine; save it again on another")
        tree = _Unpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        stored = {}  # the places of those that are not compressed; opening each checks its own header
        for name, entry in entries.items():
            if name.startswith(f"{root}/data/"):
                archive.open(entry).close()
                if entry.compress_type == zipfile.ZIP_STORED:
                    archive.fp.seek(entry.header_offset + 26)
                    stored[name] = entry.header_offset + 30 + sum(struct.unpack("<HH", archive.fp.read(4)))

    def data(key: str, start: int, end: int) -> Any:
        entry = entries[f"{root}/data/{key}"]
        if entry.filename not in stored:
            with zipfile.ZipFile(path) as archive:
                return archive.read(entry)[start:end]
        found = np.fromfile(path, np.uint8, end - start, offset=stored[entry.filename] + start)
        if len(found) == entry.file_size and zlib.crc32(found) != entry.CRC:
            raise UserError(f"cannot read {path!r}: storage {key} does not have its checksum: damaged")
        return found

    return _flatten(tree, lambda key: entries[f"{root}/data/{key}"].file_size, data)


def _legacy(path: str) -> Dict[str, Held]:
    with open(path, "rb") as file:
        if _Unpickler(file).load() != MAGIC or _Unpickler(file).load() != VERSION:
            raise UserError("it is in neither of the formats of torch.save")
        _Unpickler(file).load()  # the machine: storages are little-endian whatever it says
        unpickler = _Unpickler(file)
        tree, keys, places = unpickler.load(), _Unpickler(file).load(), {}
        end = os.fstat(file.fileno()).st_size
        for key in keys:
            count, = struct.unpack("<q", file.read(8))
            size = count * np.dtype(STORAGES[unpickler.types[key]]).itemsize
            if not 0 <= size <= end - file.tell():
                raise UserError(f"storage {key} has {end - file.tell()} bytes of {size}: cut short or damaged")
            places[key] = (file.tell(), size)
            file.seek(size, os.SEEK_CUR)

    def data(key: str, start: int, end: int) -> np.ndarray:
        return np.fromfile(path, np.uint8, end - start, offset=places[key][0] + start)

    return _flatten(tree, lambda key: places[key][1], data)


def _open_torch(path: str) -> Dict[str, Held]:
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    return (_zipped if zipped else _legacy)(path)


def _torch(path: str) -> Dict[str, np.ndarray]:
    held = _open_torch(path)
    sizes = {}
    for array in held.values():
        storage = array.tensor.storage
        sizes[storage.key] = max(sizes.get(storage.key, 0), storage.count * array.dtype.itemsize)
    whole = functools.cache(lambda data_of, key: memoryview(data_of(key, 0, sizes[key])))
    return {name: np.asarray(Held(array.tensor, lambda key, start, end, data_of=array.data_of: whole(data_of, key)[start:end]))
            for name, array in held.items()}


_TORCH = (".pt", ".pth", ".ckpt", ".bin")
READERS = {".safetensors": safetensors.numpy.load_file, ".npz": _npz, **dict.fromkeys(_TORCH, _torch)}
OPENERS = {".safetensors": open_safetensors, ".npz": _npz, **dict.fromkeys(_TORCH, _open_torch)}
