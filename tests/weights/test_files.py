"""Files of weights, put together here byte by byte: what is read, what is refused, and that nothing in them is executed."""
import io
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ldm_jax.types import UserError
from ldm_jax.weights import open_arrays, read_arrays
from ldm_jax.weights.files import READERS, STORAGES

MAGIC = 0x1950A86A20F9469CFC6C
FORMATS = ["zip", "legacy"]


# ---- a small assembler of pickles -----------------------------------------------------------------------------------

class Op(bytes):
    """Opcodes that leave one value on the stack."""


def op(value):
    if isinstance(value, Op):
        return value
    if isinstance(value, str):
        return Op(b"X" + struct.pack("<I", len(value.encode())) + value.encode())
    if isinstance(value, tuple):
        return Op(b"(" + b"".join(map(op, value)) + b"t")
    if isinstance(value, list):
        return Op(b"](" + b"".join(map(op, value)) + b"e")
    if isinstance(value, dict):
        return Op(b"}(" + b"".join(op(k) + op(v) for k, v in value.items()) + b"u")
    return Op(pickle.dumps(value, 2)[2:-1])  # None, numbers


def name(module, name):
    return Op(f"c{module}\n{name}\n".encode())


def call(function, *args):
    return Op(function + op(args) + b"R")


def new(cls, *args):
    return Op(cls + op(args) + b"\x81")


def build(value, state):
    return Op(value + op(state) + b"b")


def storage(kind, key, count, *view):
    return Op(op(("storage", name("torch", kind), key, "cpu", count, *view)) + b"Q")


def tensor(storage, offset, size, stride, function="_rebuild_tensor_v2"):
    rest = () if function == "_rebuild_tensor" else (False, call(name("collections", "OrderedDict")))
    return call(name("torch._utils", function), storage, offset, size, stride, *rest)


def dump(value):
    return b"\x80\x02" + op(value) + b"."


def write(path, form, tree, data, plant=None):
    """`tree` and the storages `data` {key: array} in one of the two formats; plant {number of the pickle: its value}."""
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/data.pkl", dump(tree))
            for key, array in data.items():
                archive.writestr(f"model/data/{key}", array.tobytes())
            archive.writestr("model/byteorder", "little")
    else:
        pickles = [MAGIC, 1001, {"little_endian": True}, tree, list(data)]
        pickles = [dump((plant or {}).get(i, value)) for i, value in enumerate(pickles)]
        path.write_bytes(b"".join(pickles) + b"".join(struct.pack("<q", a.size) + a.tobytes() for a in data.values()))
    return path


def floats(n):
    return np.arange(n, dtype=np.float32)


# ---- what is read ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", FORMATS)
def test_tensors_are_views_of_their_storage(form, tmp_path):
    """Value k of the storage is k, so each entry of a tensor says where it came from: offset + sum index * stride."""
    views = {"whole": (0, (4, 6), (6, 1)), "transposed": (0, (6, 4), (1, 6)), "part": (7, (2, 3), (12, 2)),
             "scalar": (23, (), ()), "expanded": (5, (3, 2), (0, 1)), "empty": (0, (0, 3), (3, 1)), "last": (23, (1, 1), (9, 9))}
    tree = {key: tensor(storage("FloatStorage", "0", 24, *([None] if form == "legacy" else [])), *v) for key, v in views.items()}
    arrays = read_arrays(write(tmp_path / "a.pt", form, tree, {"0": floats(24)}))
    assert set(arrays) == set(views)
    for key, (offset, size, stride) in views.items():
        want = offset + sum((i * s for i, s in zip(np.indices(size), stride)), np.zeros(size))
        assert arrays[key].dtype == np.float32 and arrays[key].shape == size
        np.testing.assert_array_equal(arrays[key], want)
    assert np.shares_memory(arrays["whole"], arrays["part"])
    for key, held in open_arrays(tmp_path / "a.pt").items():
        assert held.shape == arrays[key].shape and held.dtype == arrays[key].dtype
        np.testing.assert_array_equal(np.asarray(held), arrays[key])


@pytest.mark.parametrize("form", FORMATS)
def test_storage_types(form, tmp_path):
    data = {kind: np.arange(5).astype(dtype) for kind, dtype in STORAGES.items()}
    tree = {kind: tensor(storage(kind, kind, 5), 1, (2, 2), (2, 1)) for kind in data}
    for kind, array in read_arrays(write(tmp_path / "a.bin", form, tree, data)).items():
        assert array.dtype == STORAGES[kind]
        np.testing.assert_array_equal(array, data[kind][1:].reshape(2, 2))
    assert STORAGES["BFloat16Storage"] == ml_dtypes.bfloat16


@pytest.mark.parametrize("form", FORMATS)
def test_nested_containers_are_flattened(form, tmp_path):
    t = tensor(storage("FloatStorage", "0", 3), 0, (3,), (1,))
    ordered = build(call(name("collections", "OrderedDict"), [("conv.weight", t)]), {"_metadata": {"version": 1}})
    tree = {"state_dict": ordered, "moments": [{0: t}, (1, t)], "epoch": 3, "none": None,
            "tags": call(name("__builtin__", "set"), ["a"]), "size": call(name("torch", "Size"), (3, 4))}
    arrays = read_arrays(write(tmp_path / "a.ckpt", form, tree, {"0": floats(3)}))
    assert set(arrays) == {"state_dict.conv.weight", "moments.0.0", "moments.1.1"}
    assert set(read_arrays(write(tmp_path / "b.ckpt", form, t, {"0": floats(3)}))) == {""}
    with pytest.raises(UserError, match="two arrays of the name 'a.b'"):
        read_arrays(write(tmp_path / "c.ckpt", form, {"a": {"b": t}, "a.b": t}, {"0": floats(3)}))


@pytest.mark.parametrize("form", FORMATS)
def test_how_older_files_rebuild(form, tmp_path):
    old = tensor(storage("FloatStorage", "0", 6), 1, (2, 2), (2, 1), "_rebuild_tensor")
    hooks = call(name("collections", "OrderedDict"))
    tree = {"tensor": old, "called": call(name("torch._utils", "_rebuild_parameter"), old, True, hooks),
            "made": build(new(name("torch.nn.parameter", "Parameter"), old), (True, False, hooks)),
            "view": tensor(storage("FloatStorage", "0", 6, ("1", 2, 3)), 1, (2,), (1,))}
    arrays = read_arrays(write(tmp_path / "a.pth", form, tree, {"0": floats(6)}))
    for key in ("tensor", "called", "made"):
        np.testing.assert_array_equal(arrays[key], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(arrays["view"], [3, 4])


def test_safetensors_and_npz(tmp_path):
    arrays = {"a.b": floats(6).reshape(2, 3), "n": np.arange(3), "half": np.float16([1.5]), "scalar": np.float64(2.5)}
    np.savez(tmp_path / "a.npz", **arrays)
    more = {**{k: np.asarray(a) for k, a in arrays.items()}, "brain": floats(4).astype(ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(more, tmp_path / "a.safetensors")
    for file, wanted in (("a.npz", arrays), ("a.safetensors", more)):
        found = read_arrays(str(tmp_path / file))
        assert set(found) == set(wanted)
        for key, a in wanted.items():
            assert found[key].dtype == a.dtype and found[key].shape == np.shape(a)
            np.testing.assert_array_equal(found[key], a)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shared", [False, True])
def test_arrays_are_read_one_at_a_time(form, shared, tmp_path):
    """Twenty tensors of 1 MB, each with a storage of its own or all in one."""
    n, many = 2**18, 20
    data = {"0": floats(n * many)} if shared else {str(i): floats(n) + i for i in range(many)}
    place = lambda i: (storage("FloatStorage", "0", n * many), i * n) if shared else (storage("FloatStorage", str(i), n), 0)
    tree = {str(i): tensor(*place(i), (n,), (1,)) for i in range(many)}
    path = write(tmp_path / "a.pt", form, tree, data)
    del data
    tracemalloc.start()
    held = open_arrays(path)
    total = sum(float(np.asarray(a)[-1]) for a in held.values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 4 * n
    assert total == sum((i + 1) * n - 1 if shared else n - 1 + i for i in range(many))


def test_damage_is_found_where_an_array_is_read(tmp_path):
    tree = {key: tensor(storage("FloatStorage", key, 9), 0, (9,), (1,)) for key in "01"}
    path = write(tmp_path / "a.pt", "zip", tree, {key: floats(9) for key in "01"})
    whole = path.read_bytes()
    place = whole.index(floats(9).tobytes()) + 30
    path.write_bytes(whole[:place] + b"?" + whole[place + 1:])
    held = open_arrays(path)
    np.testing.assert_array_equal(np.asarray(held["1"]), floats(9))
    with pytest.raises(UserError, match="storage 0 does not have its checksum: damaged"):
        np.asarray(held["0"])


@pytest.mark.parametrize("form", FORMATS)
def test_what_a_trainer_leaves_stands_for_nothing(form, tmp_path):
    """Its classes are named, called, set and filled; none is imported, and what they hold is left out."""
    t = tensor(storage("FloatStorage", "0", 3), 0, (3,), (1,))
    callback = name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    dtype = build(call(name("numpy", "dtype"), "f8", 0, 1), (3, "<", None))
    score = call(name("numpy.core.multiarray", "scalar"), dtype, call(name("_codecs", "encode"), "12345678", "latin1"))
    listed = Op(new(name("omegaconf.listconfig", "ListConfig")) + b"(" + op(1) + op(2) + b"e")
    filled = Op(new(name("pytorch_lightning.utilities.parsing", "AttributeDict")) + b"(" + op("lr") + op(t) + b"u")
    tree = {"state_dict": {"w": t}, "callbacks": {callback: {"best": score}}, "hyper": listed, "more": filled,
            "args": build(new(name("argparse", "Namespace")), {"lr": 1, "out": call(name("pathlib", "PosixPath"), "/", "tmp")}),
            "moments": Op(call(name("collections", "defaultdict"), name("builtins", "dict")) + b"(" + op("m") + op(t) + b"u")}
    assert set(read_arrays(write(tmp_path / "a.ckpt", form, tree, {"0": floats(3)}))) == {"state_dict.w", "moments.m"}
    assert not {"pytorch_lightning", "omegaconf"} & set(sys.modules)


# ---- what is not executed -------------------------------------------------------------------------------------------

def bombs(path):
    """Values that make a file at `path` when they are unpickled as usual."""
    code = f"open({str(path)!r}, 'w')"
    return {"builtins.open": call(name("builtins", "open"), str(path), "w"),
            "builtins.eval": call(name("builtins", "eval"), code),
            "builtins.exec": Op(op(code) + b"\x94" + op("builtins") + op("exec") + b"\x93" + b"(h\x00tR"),  # protocol 4's names
            "os.system": Op(f"(S'touch {path}'\nios\nsystem\n".encode()),  # protocol 0's call
            "subprocess.Popen": new(name("functools", "partial"), name("subprocess", "Popen"), ["touch", str(path)])}


@pytest.mark.parametrize("bomb", sorted(bombs("")))
@pytest.mark.parametrize("form, where", [("zip", 3)] + [("legacy", i) for i in range(5)])
def test_nothing_is_executed(bomb, form, where, tmp_path):
    made = tmp_path / "made"
    value = bombs(made)[bomb]
    if form == "zip":
        write(tmp_path / "a.pt", form, {"w": value}, {})
    else:
        write(tmp_path / "a.pt", form, {}, {}, plant={where: value})
    with pytest.raises(UserError, match=f"it wants ({bomb}|functools.partial).*nothing of it was executed"):
        read_arrays(tmp_path / "a.pt")
    assert not made.exists()


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_executed_by_way_of_what_a_trainer_leaves(form, tmp_path):
    """Names with dots lead nowhere, and what is given to such objects is refused as elsewhere."""
    made = tmp_path / "made"
    for module, attribute in (("pytorch_lightning", "os.system"), ("omegaconf.omegaconf", "sys.modules"),
                              ("lightning.fabric", "__loader__.exec_module")):
        path = write(tmp_path / "a.pt", form, {"w": call(name(module, attribute), f"touch {made}")}, {})
        assert read_arrays(path) == {} and not made.exists()
    for inner in bombs(made).values():
        for tree in (call(name("argparse", "Namespace"), inner), build(new(name("argparse", "Namespace")), {"a": inner})):
            with pytest.raises(UserError, match="nothing of it was executed"):
                read_arrays(write(tmp_path / "a.pt", form, {"w": tree}, {}))
            assert not made.exists()
    for other in ("numpy.load", "numpy.core.multiarray.fromfile", "argparse.FileType", "builtins.getattr", "builtins.type", "torch.load",
                  "torch.hub.load", "xlightning.a", "pathlib.os.system", "typing.sys.exit"):
        with pytest.raises(UserError, match=f"it wants {other}"):
            read_arrays(write(tmp_path / "a.pt", form, {"w": call(name(*other.rsplit(".", 1)), "x")}, {}))


@pytest.mark.parametrize("bomb", ["builtins.open", "builtins.eval", "builtins.exec", "os.system"])
def test_the_bombs_are_live(bomb, tmp_path):
    pickle.loads(b"\x80\x04" + bombs(tmp_path / "made")[bomb] + b".")
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cannot_alter_how_the_next_is_read(form, tmp_path):
    """BUILD sets attributes of whatever is on the stack: of the rebuilding functions and classes here too."""
    t = tensor(storage("FloatStorage", "0", 3), 0, (3,), (1,))
    for i, target in enumerate([name("torch._utils", "_rebuild_tensor_v2"), name("torch.nn.parameter", "Parameter"),
                                name("collections", "OrderedDict"), name("torch", "FloatStorage"), t]):
        attributes = {"__defaults__": (1,), "__new__": name("torch.nn.parameter", "Parameter"), "offset": 1}
        for state in ((None, attributes), {"offset": 1}):
            path = write(tmp_path / f"{i}.pt", form, [build(target, state), t], {"0": floats(3)})
            try:
                read_arrays(path)
            except UserError:
                pass
            good = {"w": t, "p": build(new(name("torch.nn.parameter", "Parameter"), t), (True, False, None))}
            for a in read_arrays(write(tmp_path / "good.pt", form, good, {"0": floats(3)})).values():
                np.testing.assert_array_equal(a, floats(3))


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("offset, size, stride", [
    (0, (25,), (1,)), (1, (4, 6), (6, 1)), (24, (), ()), (0, (2, 2), (23, 1)), (-1, (2,), (1,)), (5, (3,), (-1,)),
    (0, (2, 2), (1,)), (2**40, (1,), (1,)), (0, (2**62, 2**62), (0, 0)), (0, (-1,), (1,)), (0, ("2",), (1,)), ("0", (2,), (1,)),
])
def test_a_tensor_beyond_its_storage(form, offset, size, stride, tmp_path):
    tree = {"w": tensor(storage("FloatStorage", "0", 24), offset, size, stride)}
    with pytest.raises(UserError, match="damaged"):
        read_arrays(write(tmp_path / "a.pt", form, tree, {"0": floats(24)}))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tree", [
    {"w": tensor(storage("FloatStorage", "1", 2), 0, (2,), (1,))},  # a storage that is not there
    {"w": tensor(storage("FloatStorage", "0", 99), 0, (99,), (1,))},  # shorter than it says
    {"w": tensor(storage("FloatStorage", "0", -2), 0, (2,), (1,))},
    {"w": tensor(storage("FloatStorage", "0", 24, ("1", 20, 9)), 3, (2,), (1,))},  # a view beyond it
    {"w": tensor(storage("FloatStorage", "0", 24, ("1", 2, 3)), 2, (2,), (1,))},  # beyond a view of it
    {"w": tensor("storage", 0, (2,), (1,))},
    {"w": Op(op(("module", "Net", "net.py", "source")) + b"Q")},
    {"w": Op(op(3) + b"Q")},
    {"w": Op(b"](h\x00e")},
    Op(b"]\x94h\x00a"),  # a list within itself
])
def test_a_damaged_tree(form, tree, tmp_path):
    with pytest.raises(UserError):
        read_arrays(write(tmp_path / "a.pt", form, tree, {"0": floats(24)}))


@pytest.mark.parametrize("suffix", sorted(READERS))
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_short_anywhere(form, suffix, tmp_path):
    if suffix in (".safetensors", ".npz"):
        safetensors.numpy.save_file({"w": floats(9)}, tmp_path / "a.safetensors")
        np.savez(tmp_path / "a.npz", w=floats(9))
        whole = (tmp_path / f"a{suffix}").read_bytes()
    else:
        tree = {name: tensor(storage("FloatStorage", key, 9), 0, (9,), (1,)) for name, key in (("w", "0"), ("v", "1"))}
        whole = write(tmp_path / "a", form, tree, {"0": floats(9), "1": floats(9)}).read_bytes()
    path = tmp_path / f"b{suffix}"
    path.write_bytes(whole)
    assert len(read_arrays(path)["w"]) == 9
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(UserError) as e:
            read_arrays(path)
        assert len(str(e.value).splitlines()) <= 2 and path.name in str(e.value)


def test_what_is_not_a_file_of_weights(tmp_path):
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "list.pt").write_bytes(pickle.dumps([1, 2], 2))
    (tmp_path / "dir.pt").mkdir()
    with zipfile.ZipFile(tmp_path / "pictures.pt", "w") as archive:
        archive.writestr("a.png", b"")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        archive.writestr("m/data.pkl", dump({}))
        archive.writestr("m/byteorder", "big")
    np.savez(tmp_path / "objects.npz", w=np.array([{}]))
    np.savez(tmp_path / "brain.npz", w=floats(2).astype(ml_dtypes.bfloat16))
    for file, words in (("page.pth", "damaged"), ("list.pt", "neither of the formats"), ("dir.pt", "no file"),
                        ("none.pt", "no file"), ("pictures.pt", "zip archive"), ("big.pt", "big-endian"),
                        ("objects.npz", "allow_pickle"), ("brain.npz", "'w'.*bfloat16"),
                        ("a.onnx", "cannot tell.*safetensors, .npz, .pt")):
        with pytest.raises(UserError, match=words):
            read_arrays(tmp_path / file)


def test_a_path_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(io.FileIO(tmp_path / "a.npz", "w"), w=floats(2))
    assert set(read_arrays(os.path.join("~", "a.npz"))) == {"w"}
