"""The text tower against float64 numpy, its published sizes, and what may look at what."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.clip import ACTIVATIONS, TEXT_TOWERS, clip_text
from ldm_jax.types import UserError
from tests.models.tiny import count, random_params

SMALL = dict(vocab_size=20, width=12, depth=3, num_heads=3, mlp_width=20, max_length=9, eps=1e-3, eos_id=18, projection_dim=5)
IDS = np.array([[17, 3, 4, 18, 18, 18, 18, 18], [17, 9, 19, 2, 5, 18, 0, 0], [17, 1, 2, 3, 4, 5, 6, 7]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 0, 0], [1] * 8], bool)
CURVES = {"quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)), "relu": lambda x: np.maximum(x, 0),
          "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2, "silu": lambda x: x / (1 + np.exp(-x)),
          "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2}


def oracle(params, ids, mask, activation, heads, eps):
    """The states between the blocks, one text at a time and one head at a time, and the last norm of the last."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    norm = lambda p, x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]
    linear = lambda p, x: x @ p["kernel"] + p["bias"]
    hidden, last = [], []
    for row, keys in zip(ids, mask):
        x = params["token"]["embedding"][row] + params["position"][:len(row)]
        states = [x]
        for i in range(len(params["blocks"]["q"]["bias"])):
            p = jax.tree.map(lambda a: a[i], params["blocks"])
            h = norm(p["norm_1"], x)
            parts = []
            for q, k, v in zip(*(np.split(linear(p[n], h), heads, -1) for n in ("q", "k", "v"))):
                logits = q @ k.T / math.sqrt(q.shape[-1])
                weights = np.array([[np.exp(a) if s <= t and keys[s] else 0.0 for s, a in enumerate(line)]
                                    for t, line in enumerate(logits)])
                parts.append(weights / weights.sum(-1, keepdims=True) @ v)
            x = x + linear(p["out"], np.concatenate(parts, -1))
            x = x + linear(p["mlp_out"], CURVES[activation](linear(p["mlp_in"], norm(p["norm_2"], x))))
            states.append(x)
        hidden.append(states)
        last.append(norm(params["norm_out"], x))
    return np.array(hidden).swapaxes(0, 1), np.array(last)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_numpy(activation):
    tower = clip_text(**{**SMALL, "activation": activation})
    params = random_params(tower)
    got = jax.jit(lambda p, i, m: tower.apply(p, i, m, hidden=True))(params, IDS, MASK)
    hidden, last = oracle(params, IDS, MASK, activation, 3, 1e-3)
    np.testing.assert_allclose(got.hidden, hidden, atol=2e-5)
    np.testing.assert_allclose(got.last, last, atol=2e-5)
    np.testing.assert_allclose(got.pooled, last[[0, 1, 2], [3, 5, 0]], atol=2e-5)  # the first end; the start where there is none
    np.testing.assert_allclose(got.projected, np.asarray(got.pooled) @ params["projection"]["kernel"], atol=2e-5)


def test_outputs_on_request():
    """Without mask and projection; pooling at the highest id; the last norm by itself; hidden states do not change the rest."""
    tower = clip_text(**{**SMALL, "eos_id": None, "projection_dim": None})
    params = random_params(tower)
    full, plain = (jax.jit(lambda p, i: tower.apply(p, i, hidden=hidden))(params, IDS) for hidden in (True, False))
    assert plain.hidden is None and plain.projected is None and full.hidden.shape == (4, 3, 8, 12)
    np.testing.assert_allclose(plain.last, full.last, atol=1e-6)
    np.testing.assert_allclose(plain.pooled, np.asarray(plain.last)[[0, 1, 2], [3, 2, 0]], atol=1e-6)
    np.testing.assert_allclose(tower.final_norm(params, full.hidden[-1]), full.last, atol=1e-6)
    ones = jax.jit(tower.apply)(params, IDS, np.ones_like(IDS))
    np.testing.assert_allclose(ones.last, plain.last, atol=1e-6)


def test_a_token_sees_those_before_it():
    tower = clip_text(**SMALL)
    params, apply = random_params(tower), jax.jit(tower.apply)
    changed = IDS.copy()
    changed[:, 4] = 11
    before, after = apply(params, IDS), apply(params, changed)
    np.testing.assert_array_equal(before.last[:, :4], after.last[:, :4])
    assert np.all(np.abs(np.asarray(before.last - after.last))[:, 4:].max(-1) > 1e-3)


@pytest.mark.parametrize("name, parameters", [
    ("clip_vit_l", 123_060_480), ("openclip_vit_h", 340_387_840), ("openclip_vit_bigg", 694_659_840)])
def test_published_sizes(name, parameters):
    assert count(clip_text(**TEXT_TOWERS[name])) == parameters
    assert set(TEXT_TOWERS) == {"clip_vit_l", "openclip_vit_h", "openclip_vit_bigg"}


def test_arguments_make_the_same_tower():
    assert clip_text(**clip_text(**SMALL).arguments) == clip_text(**SMALL)


def test_bfloat16():
    params = random_params(clip_text(**SMALL))
    want, got = (jax.jit(clip_text(**SMALL, dtype=dtype).apply)(params, IDS, MASK) for dtype in ("float32", "bfloat16"))
    assert got.last.dtype == got.pooled.dtype == got.projected.dtype == jnp.float32
    np.testing.assert_allclose(got.last, want.last, atol=0.15)
    assert np.abs(np.asarray(got.last - want.last)).max() > 1e-4


def test_start():
    """The spreads of Radford et al.'s release."""
    tower = clip_text(vocab_size=2000, width=64, depth=8, num_heads=4, max_length=50, projection_dim=64)
    params = tower.init(jax.random.key(0))
    outward = (16 * 64) ** -0.5
    want = {"q": 64**-0.5, "k": 64**-0.5, "v": 64**-0.5, "out": outward, "mlp_in": 128**-0.5, "mlp_out": outward}
    for name, std in want.items():
        assert np.std(params["blocks"][name]["kernel"]) == pytest.approx(std, rel=0.03), name
        assert not np.any(params["blocks"][name]["bias"])
        assert np.std(params["blocks"][name]["kernel"][0] - params["blocks"][name]["kernel"][1]) > std  # each block its own
    for name, a, std in (("token", params["token"]["embedding"], 0.02), ("position", params["position"], 0.01),
                         ("projection", params["projection"]["kernel"], 64**-0.5)):
        assert np.std(a) == pytest.approx(std, rel=0.04), name


@pytest.mark.parametrize("change, words", [
    (dict(activation="tanh"), "choose from: gelu"), (dict(num_heads=5), "num_heads=5 does not divide"),
    (dict(attention_impl="x"), "attention_impl"), (dict(dtype="float16"), "dtype"), (dict(depth=0), "depth=0")])
def test_refused(change, words):
    with pytest.raises(UserError, match=words):
        clip_text(**{**SMALL, **change})


@pytest.mark.parametrize("ids, mask, words", [
    (np.zeros((1, 10), np.int32), None, r"\(1, 10\).*at most 9"), (np.zeros(4, np.int32), None, r"\(4,\)"),
    (IDS, MASK[:1], r"a mask of shape \(1, 8\)")])
def test_refused_inputs(ids, mask, words):
    tower = clip_text(**SMALL)
    with pytest.raises(UserError, match=words):
        tower.apply(jax.eval_shape(tower.init, jax.random.key(0)), ids, mask)
