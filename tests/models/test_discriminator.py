"""Discriminators: sizes, what a logit sees, norms, and what is refused."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.discriminator import DISCRIMINATORS, NORMS, BatchNorm, patchgan
from ldm_jax.types import UserError
from tests.models.tiny import count, random_params


@pytest.mark.parametrize("channels, parameters", [(3, 2765633), (6, 2768705)])
def test_parameters_of_the_published_patchgan(channels, parameters):
    assert count(patchgan((256, 256, channels), norm="batch")) == parameters


@pytest.mark.parametrize("name", sorted(DISCRIMINATORS))
@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("size, layers, out", [((256, 256), 3, (30, 30)), ((32, 50), 3, (2, 4)), ((24, 31), 3, (1, 1)),
                                               ((8, 8), 1, (2, 2))])
def test_shapes(name, norm, size, layers, out):
    net = DISCRIMINATORS[name]((*size, 1), width=8, layers=layers, norm=norm, dtype="bfloat16")
    params = jax.eval_shape(net.init, jax.random.key(0))
    logits = jax.eval_shape(net.apply, params, jnp.zeros((2, *size, 1)))
    assert logits.shape == (2, *out, 1) and logits.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_a_logit_sees_70_pixels():
    """Isola et al. 2017: without norms, a logit in the middle depends on exactly 70 x 70 pixels."""
    net = patchgan((128, 128, 1), width=2, norm="none")
    params = jax.tree.map(np.abs, random_params(net))
    seen = jax.jit(jax.grad(lambda x: net.apply(params, x)[0, 6, 7, 0]))(jnp.ones((1, 128, 128, 1)))[0, :, :, 0] != 0
    rows, columns = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
    assert seen.sum() == 70 * 70 and np.ptp(rows) == np.ptp(columns) == 69


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_only_batch_norm_mixes_examples(norm):
    net = patchgan((16, 16, 3), width=8, layers=2, norm=norm)
    params, apply = random_params(net), jax.jit(net.apply)
    x = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    change = np.abs(apply(params, x) - apply(params, x.at[2].multiply(2.0))).max((1, 2, 3))
    assert np.std(apply(params, x)) > 1e-2 and change[2] > 1e-3
    assert np.all(change[:2] > 1e-3) if norm == "batch" else np.all(change[:2] < 1e-6)


def test_batch_norm():
    rng = np.random.default_rng(0)
    x, scale, bias = 3 * rng.normal(size=(4, 3, 2, 5)) + 7, rng.normal(size=5), rng.normal(size=5)
    got = BatchNorm().apply({"params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}, jnp.asarray(x))
    want = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5) * scale + bias
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_start():
    """Kernels of standard deviation 0.02, scales 1, biases 0; no bias before a batch norm."""
    params = patchgan((24, 24, 3), width=16, norm="batch").init(jax.random.key(0))
    assert sorted(name for name in params if "bias" in params[name]) == ["conv_0", "conv_out", "norm_1", "norm_2", "norm_3"]
    for name, p in params.items():
        assert not np.any(p.get("bias", 0)) and np.all(p.get("scale", 1) == 1)
        if "kernel" in p:
            np.testing.assert_allclose([np.mean(p["kernel"]), np.std(p["kernel"])], [0, 0.02], atol=2e-3)


@pytest.mark.parametrize("name", sorted(DISCRIMINATORS))
@pytest.mark.parametrize("kwargs, words", [
    (dict(image_shape=(64, 23, 3)), "64x23.*layers=3.*24 pixels"),
    (dict(image_shape=(8, 8, 1), layers=2), "8x8.*12 pixels"),
    (dict(image_shape=(32, 32, 3), norm="layer"), "layer.*batch, group, none"),
    (dict(image_shape=(32, 32, 3), dtype="half"), "half.*bfloat16, float32"),
    (dict(image_shape=(32, 32, 3), layers=0), "layers 0"),
])
def test_what_does_not_fit_is_refused_by_name(name, kwargs, words):
    with pytest.raises(UserError, match=words):
        DISCRIMINATORS[name](**kwargs)
