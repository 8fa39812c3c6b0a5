"""First stages: sizes, the latent's statistics, and what they refuse."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import AUTOENCODERS
from ldm_jax.models.autoencoder import kl
from ldm_jax.types import UserError
from tests.models.tiny import count, random_params

TINY = dict(image_shape=(8, 12, 3), factor=4, latent_channels=2, width=8, num_res_blocks=1, dropout=0.1)


def test_parameters_of_the_published_autoencoder():
    assert count(kl((256, 256, 3), 8, mults=(1, 2, 4, 4))) == 83653863  # counted in the released weights of Stable Diffusion


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
def test_shapes_at_every_factor(name, factor):
    ae = AUTOENCODERS[name]((64, 32, 3), factor, 5, width=32)
    assert ae.latent_shape == (64 // factor, 32 // factor, 5)
    params = jax.eval_shape(ae.init, jax.random.key(0))
    z = jax.eval_shape(ae.encode, params, jnp.zeros((2, 64, 32, 3)))
    assert {a.shape[1:3] for a in jax.tree.leaves(z) if a.ndim > 1} == {ae.latent_shape[:2]}
    assert jax.eval_shape(ae.decode, params, jnp.zeros((2, *ae.latent_shape))).shape == (2, 64, 32, 3)


@pytest.fixture(scope="module")
def tiny():
    ae = kl(**TINY)
    return ae, random_params(ae), jax.jit(ae.encode), jax.jit(ae.decode)


def test_encode_and_decode(tiny):
    ae, params, encode, decode = tiny
    x = jax.random.normal(jax.random.key(0), (3, 8, 12, 3))
    mean, logvar = encode(params, x)
    image = decode(params, mean)
    assert mean.shape == logvar.shape == (3, 2, 3, 2) and image.shape == (3, 8, 12, 3)
    for a in (mean, logvar, image):
        assert a.dtype == jnp.float32 and np.all(np.isfinite(a)) and np.std(a) > 0.01
    assert np.all(np.abs(decode(params, mean + 0.5) - image).max((1, 2, 3)) > 1e-3)


def test_log_variance_is_clipped_and_apart_from_the_mean(tiny):
    """With the last 1x1 convolution's kernel zero its bias is (mean, log variance); the variance's half stays in [-30, 20]."""
    ae, params, encode, _ = tiny
    quant = {"kernel": np.zeros_like(params["quant_in"]["kernel"]), "bias": np.array([99.0, -7.0, 99.0, -99.0], np.float32)}
    mean, logvar = encode({**params, "quant_in": quant}, jnp.ones((1, 8, 12, 3)))
    assert np.all(np.asarray(mean) == [99.0, -7.0]) and np.all(np.asarray(logvar) == [20.0, -30.0])


def test_dropout_needs_a_key(tiny):
    ae, params, encode, _ = tiny
    x = jnp.ones((1, 8, 12, 3))
    with pytest.raises(UserError, match="dropout"):
        ae.encode(params, x, train=True)
    train = jax.jit(lambda key: ae.decode(params, jnp.ones((1, 2, 3, 2)), True, {"dropout": key}))
    assert np.abs(train(jax.random.key(0)) - train(jax.random.key(1))).max() > 1e-3


def test_bfloat16_computes_close_and_returns_float32(tiny):
    ae, params, _, decode = tiny
    z = jax.random.normal(jax.random.key(0), (3, 2, 3, 2))
    want, got = decode(params, z), jax.jit(kl(**TINY, dtype="bfloat16").decode)(params, z)
    assert got.dtype == jnp.float32 and 1e-4 < np.std(got - want) / np.std(want) < 0.05


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
@pytest.mark.parametrize("kwargs, words", [
    (dict(image_shape=(32, 32, 3), factor=6), "factor=6.*power of two"),
    (dict(image_shape=(32, 32, 3), factor=0), "factor=0.*power of two"),
    (dict(image_shape=(28, 30, 3), factor=4), "28x30.*factor=4"),
    (dict(image_shape=(32, 32, 3), factor=4, mults=(1, 2)), "mults=.*3 entries"),
    (dict(image_shape=(32, 32, 3), factor=4, attention=(64,)), "attention=.*32, 16, 8"),
    (dict(image_shape=(32, 32, 3), width=30, norm_groups=32), "norm_groups=32"),
    (dict(image_shape=(32, 32, 3), dtype="half"), "half.*bfloat16, float32"),
])
def test_what_does_not_fit_is_refused_by_name(name, kwargs, words):
    with pytest.raises(UserError, match=words):
        AUTOENCODERS[name](**kwargs)


def test_an_image_that_does_not_fit_is_refused(tiny):
    ae, params, _, _ = tiny
    with pytest.raises(UserError, match="9x12.*factor=4"):
        ae.encode(params, jnp.ones((1, 9, 12, 3)))
