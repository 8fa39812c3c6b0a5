"""Rules between published arrays and ours: what each transform does, both directions, and what does not fit."""
import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from ldm_jax.types import UserError
from ldm_jax.weights import rules
from ldm_jax.weights.rules import Rule

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
shapes = lambda params: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)

CONV, MATRIX, PATCH, FUSED, LAYERS = normal(5, 4, 3, 2), normal(5, 4), normal(5, 3, 2, 2), normal(6, 4), normal(3, 5, 4)
KINDS = {  # rules, published arrays, the parameters as sums say
    "conv": (rules.conv("a", "b/c", bias=False), {"a.weight": CONV}, {"b": {"c": {"kernel": np.einsum("oihw->hwio", CONV)}}}),
    "linear": (rules.linear("a", "b"), {"a.weight": MATRIX, "a.bias": MATRIX[:, 0]},
               {"b": {"kernel": np.einsum("oi->io", MATRIX), "bias": MATRIX[:, 0]}}),
    "pointwise": (rules.pointwise("a", "b", bias=False), {"a.weight": MATRIX.reshape(5, 4, 1, 1)}, {"b": {"kernel": MATRIX.T}}),
    "norm": (rules.norm("a", "b"), {"a.weight": MATRIX[0], "a.bias": MATRIX[1]}, {"b": {"scale": MATRIX[0], "bias": MATRIX[1]}}),
    "table": (rules.table("a", "b"), {"a.weight": MATRIX}, {"b": {"embedding": MATRIX}}),
    "patches": ([Rule("a", "b", rules.patches(2))], {"a": PATCH},
                {"b": np.stack([PATCH[:, c, i, j] for i in range(2) for j in range(2) for c in range(3)])}),
    "fused": ([Rule("a", ("q", "k", "v"), rules.LINEAR)], {"a": FUSED}, {"q": FUSED[:2].T, "k": FUSED[2:4].T, "v": FUSED[4:].T}),
    "parts": ([Rule("a", ("q", "k"), rules.LINEAR, parts=rules.Transform(
        lambda a: [a[0::2], a[1::2]], lambda parts: np.stack(parts, 1).reshape(6, 4)))], {"a": FUSED},
        {"q": FUSED[0::2].T, "k": FUSED[1::2].T}),
    "layers": ([Rule("a.{}.w", "b/w", rules.LINEAR, layers=3)], {f"a.{i}.w": LAYERS[i] for i in range(3)},
               {"b": {"w": np.einsum("loi->lio", LAYERS)}}),
    "copies": ([Rule("a.{}.w", "b", rules.LINEAR, copies=2)], {"a.0.w": MATRIX, "a.1.w": MATRIX.copy()}, {"b": MATRIX.T}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions(kind):
    table, arrays, params = KINDS[kind]
    got = rules.load(table, arrays, shapes(params))
    jax.tree.map(np.testing.assert_array_equal, got, params)
    back = rules.save(table, got)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


def test_a_matrix_may_have_been_a_convolution():
    table, _, params = KINDS["linear"]
    got = rules.load(table, {"a.weight": MATRIX[:, :, None, None], "a.bias": MATRIX[:, 0]}, shapes(params))
    jax.tree.map(np.testing.assert_array_equal, got, params)


@dataclasses.dataclass
class Logged:
    """An array in a file, which writes down when it is read."""
    name: str
    array: np.ndarray
    log: list
    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def __array__(self, dtype=None, copy=None):
        self.log.append(("read", self.name))
        return self.array


def test_one_array_at_a_time_goes_straight_to_its_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    log, arrays = [], {"a.weight": normal(4, 8), "b.weight": normal(4, 16)}
    table = rules.linear("a", "a", bias=False) + rules.linear("b", "b", bias=False)

    def place(path, shape, dtype):
        log.append(("place", path, shape, dtype))
        return sharding
    got = rules.load(table, {name: Logged(name, a, log) for name, a in arrays.items()},
                     {"a": {"kernel": np.zeros((8, 4))}, "b": {"kernel": np.zeros((16, 4))}},
                     dtype=ml_dtypes.bfloat16, place=place)
    assert log == [("read", "a.weight"), ("place", "a/kernel", (8, 4), ml_dtypes.bfloat16),
                   ("read", "b.weight"), ("place", "b/kernel", (16, 4), ml_dtypes.bfloat16)]
    for name in "ab":
        kernel = got[name]["kernel"]
        assert kernel.sharding == sharding and kernel.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(kernel, arrays[f"{name}.weight"].T.astype(ml_dtypes.bfloat16))


def test_everything_that_does_not_fit_is_in_one_error_and_nothing_is_read():
    log = []
    table = rules.linear("a", "a") + rules.norm("n", "n")
    arrays = {"a.weight": normal(4, 3), "a.bias": np.zeros(4, np.int32), "n.weight": normal(4),
              **{f"left.{i:02}": normal(1) for i in range(9)}}
    want = {"a": {"kernel": np.zeros((5, 4)), "bias": np.zeros(4)}, "n": {"scale": np.zeros(4), "bias": np.zeros(4)},
            "x": np.zeros(1)}
    with pytest.raises(UserError) as error:
        rules.load(table, {name: Logged(name, a, log) for name, a in arrays.items()}, want, what="the weights in 'unet'")
    for words in ("weights in 'unet'", "1 (n.bias) missing",
                  "9 (left.00, left.01, left.02, left.03, left.04, left.05, and 3 more) left",
                  "1 (a.weight (4, 3) instead of (4, 5)) of another shape", "1 (a.bias int32) not of floating", "1 (x) of ours"):
        assert words in str(error.value), str(error.value)
    assert not log


def test_copies_that_differ():
    table, arrays, params = KINDS["copies"]
    with pytest.raises(UserError, match="'a.1.w' that differs from 'a.0.w'"):
        rules.load(table, {**arrays, "a.1.w": MATRIX + 1}, shapes(params))


def test_save_wants_every_parameter():
    with pytest.raises(UserError, match="a/bias"):
        rules.save(rules.linear("a", "a"), {"a": {"kernel": MATRIX}})


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_other_precisions_are_converted(dtype):
    got = rules.load(rules.linear("a", "a", bias=False), {"a.weight": MATRIX.astype(dtype)}, {"a": {"kernel": np.zeros((4, 5))}})
    assert got["a"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(got["a"]["kernel"], MATRIX.astype(dtype).T.astype(np.float32))
