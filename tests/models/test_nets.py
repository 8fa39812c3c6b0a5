"""What every denoising network of the table promises, on tiny ones that take every condition there is."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import NETS
from ldm_jax.types import UserError
from tests.models.tiny import random_params

TINY = {"unet": dict(width=8, mults=(1, 2), num_res_blocks=1, attention=(4,)), "dit": dict(width=32, depth=2, num_heads=2)}
CONTEXT = {"unet": dict(transformer_depth=1)}  # what else a network needs to take a context
SHAPE, CLASSES = (8, 8, 2), 3
X, T = jax.random.normal(jax.random.key(1), (3, *SHAPE)), jnp.linspace(0.2, 1.0, 3)
SEEN = jnp.array([[True, True, False, False], [True, False, True, True], [True, True, True, True]])
COND = {"class": jnp.array([0, 1, 2]), "vector": jnp.ones((3, 5)), "concat": jnp.ones((3, 8, 8, 1)),
        "context": jax.random.normal(jax.random.key(2), (3, 4, 6)), "context_mask": SEEN}


def build(name, **kwargs):
    return NETS[name](SHAPE, **{"num_classes": CLASSES, **TINY.get(name, {}), **kwargs})


def full(name, **kwargs):
    return build(name, **{**dict(out_channels=4, vector_dim=5, concat_channels=1, context_dim=6, dropout=0.5),
                          **CONTEXT.get(name, {}), **kwargs})


@pytest.fixture(scope="module", params=sorted(NETS))
def case(request):
    net = full(request.param)
    return request.param, random_params(net), jax.jit(net.apply, static_argnames="train")


@pytest.mark.parametrize("name", sorted(NETS))
def test_fresh_parameters(name):
    """A plain float32 dict, which is the same with and without an outer jit, and for which the network answers zero."""
    net = build(name)
    params = net.init(jax.random.key(0))

    def walk(tree):
        assert type(tree) is dict
        for key, value in tree.items():
            assert isinstance(key, str) and "/" not in key
            if isinstance(value, dict):
                walk(value)
            else:
                assert value.dtype == jnp.float32
    walk(params)
    jax.tree.map(np.testing.assert_array_equal, params, jax.jit(net.init)(jax.random.key(0)))
    assert not np.any(jax.jit(net.apply)(params, X, T))


def test_shape_type_and_finite_for_an_odd_batch(case):
    _, params, apply = case
    out = apply(params, X, T, COND)
    assert out.shape == (3, 8, 8, 4) and out.dtype == jnp.float32 and np.all(np.isfinite(out)) and np.std(out) > 0.05


def test_time_and_every_condition_change_the_output(case):
    _, params, apply = case
    base = apply(params, X, T, COND)
    others = [apply(params, X, 0.9 * T, COND)]
    others += [apply(params, X, T, {**COND, name: value}) for name, value in
               (("class", (COND["class"] + 1) % CLASSES), ("vector", -COND["vector"]), ("concat", -COND["concat"]),
                ("context", jnp.zeros_like(COND["context"])))]
    for out in others:
        assert np.all(np.abs(out - base).max((1, 2, 3)) > 1e-3)


def test_a_class_left_out_is_the_null_class(case):
    _, params, apply = case
    rest = {name: value for name, value in COND.items() if name != "class"}
    null = apply(params, X, T, rest)
    np.testing.assert_allclose(null, apply(params, X, T, {**rest, "class": jnp.full(3, CLASSES)}), atol=1e-5)
    assert np.all(np.abs(apply(params, X, T, COND) - null).max((1, 2, 3)) > 1e-3)


def test_a_masked_token_has_no_effect_and_no_gradient(case):
    """Nor has any token of an example that sees none."""
    name, params, apply = case
    base = apply(params, X, T, COND)
    other = jnp.where(SEEN[..., None], COND["context"], 9.0)
    np.testing.assert_array_equal(apply(params, X, T, {**COND, "context": other}), base)
    gradient = jax.jit(jax.grad(lambda c, seen: jnp.sum(full(name).apply(
        params, X, T, {**COND, "context": c, "context_mask": seen}) ** 2)))
    size = np.abs(gradient(COND["context"], SEEN)).max(-1)
    assert np.all(size[~SEEN] == 0) and np.all(size[SEEN] > 1e-4)
    none = SEEN.at[1].set(False)
    size = np.abs(gradient(COND["context"], none)).max(-1)
    assert np.all(size[~none] == 0) and np.all(size[none] > 1e-4)


def test_examples_do_not_see_each_other(case):
    _, params, apply = case
    out = apply(params, X, T, COND)
    np.testing.assert_array_equal(apply(params, X.at[0].multiply(-1), T, COND)[1:], out[1:])


def test_dropout_only_when_training_with_a_key(case):
    name, params, apply = case
    one, two = (apply(params, X, T, COND, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert np.abs(one - apply(params, X, T, COND)).max() > 1e-2 and np.abs(one - two).max() > 1e-2
    with pytest.raises(UserError, match="dropout"):
        full(name).apply(params, X, T, COND, train=True)


def test_bfloat16_computes_close_and_returns_float32(case):
    name, params, apply = case
    want, got = apply(params, X, T, COND), jax.jit(full(name, dtype="bfloat16").apply)(params, X, T, COND)
    assert got.dtype == jnp.float32
    assert 1e-4 < np.std(got - want) / np.std(want) < 0.05  # eight bits of mantissa: not equal, and near


@pytest.mark.parametrize("name", sorted(NETS))
def test_conditions_are_checked_by_name(name):
    net = build(name)
    for cond in (None, {}, {"class": None}):
        np.testing.assert_array_equal(net.conditions(cond, 2)["class"], [CLASSES, CLASSES])
    np.testing.assert_array_equal(net.conditions(np.array([2, 0]), 2)["class"], [2, 0])
    assert build(name, num_classes=None).conditions(None, 2) == {}
    for wrong, words in ((build(name, num_classes=None), r"\[\].*\['class'\]"),
                         (full(name), r"'concat', 'context', 'vector'\].*\['class'\]")):
        with pytest.raises(UserError, match=words):
            wrong.apply({}, X, T, jnp.arange(3))


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_unit_of_time(name):
    steps = 1000
    t_k = ((np.arange(steps) + 1) / steps).astype(np.float32)
    np.testing.assert_array_equal(build(name, timesteps=steps).module_time(t_k), np.arange(steps))
    np.testing.assert_allclose(build(name, time_scale=250.0).module_time(t_k), 0.25 * np.arange(1, steps + 1), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(NETS))
@pytest.mark.parametrize("kwargs, words", [
    (dict(dtype="float64"), "float64.*bfloat16, float32"),
    (dict(attention_impl="flash"), "flash.*auto, cudnn, einsum, xla"),
    (dict(num_heads=7), "num_heads=7"),
    (dict(remat=True), "remat True.*dots, full, none"),
])
def test_bad_arguments_are_named(name, kwargs, words):
    with pytest.raises(UserError, match=words):
        build(name, **kwargs)


@pytest.mark.parametrize("name", sorted(NETS))
def test_a_net_is_a_value(name):
    """Equal arguments give equal, hashable nets, so that what is compiled for one serves the other."""
    assert build(name) == build(name) and hash(build(name)) == hash(build(name))
    assert build(name) != build(name, num_classes=4) and dataclasses.is_dataclass(build(name))
