"""Classifiers on noisy images: published sizes, the pooling, and what they share with the U-Net."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import ADM_CLASSIFIERS, CLASSIFIERS, unet
from ldm_jax.models.classifier import POOLINGS, AttentionPool
from ldm_jax.types import UserError
from tests.models.tiny import random_params

SHAPE, CLASSES = (4, 4, 2), 3
X, T = jax.random.normal(jax.random.key(1), (3, *SHAPE)), jnp.linspace(0.2, 1.0, 3)


def build(name="adm", **kwargs):
    return CLASSIFIERS[name](SHAPE, CLASSES, **{**dict(width=8, mults=(1,), num_res_blocks=1, attention=(4,), head_width=4),
                                                **kwargs})


def counted(width, mults, blocks, attended, size, classes):
    """The parameters by hand: convolutions 9 i o + o, linear maps i o + o, norms 2 c."""
    conv, linear = (lambda i, o: 9 * i * o + o), (lambda i, o: i * o + o)
    E = 4 * width
    res = lambda i, o: 2 * i + conv(i, o) + linear(E, 2 * o) + 2 * o + conv(o, o) + (linear(i, o) if i != o else 0)
    attention = lambda c: 2 * c + 4 * linear(c, c)
    total, c = linear(width, E) + linear(E, E) + conv(3, width), width
    for i, mult in enumerate(mults):
        for _ in range(blocks):
            total, c = total + res(c, width * mult), width * mult
            total += attention(c) if size >> i in attended else 0
        total += res(c, c) if i < len(mults) - 1 else 0
    tokens = (size >> (len(mults) - 1)) ** 2 + 1
    return total + 2 * res(c, c) + attention(c) + 2 * c + tokens * c + 3 * linear(c, c) + linear(c, classes)


@pytest.mark.parametrize("name, depth, mults, millions", [
    ("adm_64", 4, (1, 2, 3, 4), 65.4), ("adm_128", 2, (1, 1, 2, 3, 4), 42.6), ("adm_256", 2, (1, 1, 2, 2, 4, 4), 54.1)])
def test_published_sizes(name, depth, mults, millions):
    """The 256 pixel one is 216 MB of float32 as released."""
    classifier, spec = CLASSIFIERS["adm"](**ADM_CLASSIFIERS[name]), jax.ShapeDtypeStruct
    params = jax.eval_shape(classifier.init, jax.random.key(0))
    got = sum(a.size for a in jax.tree.leaves(params))
    assert got == counted(128, mults, depth, (32, 16, 8), classifier.image_shape[0], 1000)
    assert got == pytest.approx(millions * 1e6, abs=0.05e6)
    out = jax.eval_shape(classifier.apply, params, spec((2, *classifier.image_shape), jnp.float32), spec((2,), jnp.float32))
    assert out.shape == (2, 1000) and out.dtype == jnp.float32
    assert [classifier.net.module_time(jnp.float32(t)) for t in (0.001, 1.0)] == [0.0, 999.0]


def test_every_published_size_is_counted():
    assert sorted(ADM_CLASSIFIERS) == ["adm_128", "adm_256", "adm_64"]


def test_the_way_down_is_that_of_the_unet():
    """The same names and shapes, so that either can be read by one map of names."""
    options = dict(width=8, mults=(1, 2), num_res_blocks=2, attention=(4,), head_width=4)
    flat = lambda net: {jax.tree_util.keystr(path): a.shape for path, a in jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(net.init, jax.random.key(0)))}
    mine = flat(CLASSIFIERS["adm"]((8, 8, 2), CLASSES, **options))
    theirs = flat(unet((8, 8, 2), resample="block", scale_shift=True, time_order="cos_sin", **options))
    down = lambda tree, *ends: {name: shape for name, shape in tree.items() if not name.startswith(tuple(f"['{e}" for e in ends))}
    assert down(mine, "pool", "logits", "norm_out") == down(theirs, "up_", "conv_out", "norm_out")


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits(name, pooling):
    """Zero at first; then float32, of every example alone, dependent on picture and time."""
    classifier = build(name, pooling=pooling)
    apply, params = jax.jit(classifier.apply), random_params(classifier)
    fresh = classifier.init(jax.random.key(0))
    assert not np.any(apply(fresh, X, T))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), fresh, params)
    out = apply(params, X, T)
    assert out.shape == (3, CLASSES) and out.dtype == jnp.float32 and np.std(out) > 0.05
    np.testing.assert_array_equal(apply(params, X.at[0].multiply(-1), T)[1:], out[1:])
    for other in (apply(params, -X, T), apply(params, X, 0.9 * T)):
        assert np.all(np.abs(other - out).max(1) > 1e-3)
    if pooling == "mean":
        apply(params, jnp.ones((3, 8, 4, 2)), T)  # which has no positions, and so takes any size


def test_bfloat16_computes_close_and_returns_float32():
    classifier = build(remat="full")
    params = random_params(classifier)
    want, got = (jax.jit(c.apply)(params, X, T) for c in (classifier, build(dtype="bfloat16")))
    assert got.dtype == jnp.float32 and 1e-5 < np.abs(got - want).max() / np.std(want) < 0.1


def test_dropout_only_when_training_with_a_key():
    classifier = build(dropout=0.5, pooling="mean")
    params, apply = random_params(classifier), jax.jit(classifier.apply, static_argnames="train")
    one, two = (apply(params, X, T, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert np.abs(one - two).max() > 1e-3
    with pytest.raises(UserError, match="dropout"):
        classifier.apply(params, X, T, train=True)


def test_the_pooling_is_the_answer_of_the_mean_token():
    """Against numpy: the mean, put before the pixels; positions added; two heads; the first token's row."""
    rng = np.random.default_rng(0)
    x, C, S = rng.standard_normal((2, 2, 3, 8)), 8, 7
    params = {"positions": rng.standard_normal((S, C)), **{name: {"kernel": rng.standard_normal((C, C)) / 3,
                                                                   "bias": rng.standard_normal(C)} for name in "qkv"}}
    got = AttentionPool(2, "einsum", jnp.float32).apply({"params": jax.tree.map(jnp.float32, params)}, jnp.float32(x))
    tokens = x.reshape(2, 6, C)
    tokens = np.concatenate([tokens.mean(1, keepdims=True), tokens], 1) + params["positions"]
    q, k, v = ((tokens @ params[n]["kernel"] + params[n]["bias"]).reshape(2, S, 2, 4) for n in "qkv")
    logits = np.einsum("bhd,bshd->bhs", q[:, 0], k) / 2.0
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.einsum("bhs,bshd->bhd", p / p.sum(-1, keepdims=True), v).reshape(2, C)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kwargs, words", [
    (dict(pooling="max"), "max.*attention, mean"), (dict(num_classes=1), "num_classes=1"), (dict(head_width=64), "head_width=64"),
    (dict(attention=(32,)), "attention=.*levels have"), (dict(attention_impl="flash"), "auto, cudnn, einsum, xla"),
    (dict(mults=(1, 2, 2, 2)), "4x4.*divisible by 8"),
])
def test_what_does_not_fit_is_refused_by_name(kwargs, words):
    with pytest.raises(UserError, match=words):
        CLASSIFIERS["adm"](**{**dict(image_shape=SHAPE, num_classes=CLASSES, width=8, mults=(1,), attention=(4,), head_width=4),
                              **kwargs})
