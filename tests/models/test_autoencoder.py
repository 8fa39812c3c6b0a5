"""First stages: sizes, the latent's statistics, and what they refuse."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import AUTOENCODERS
from ldm_jax.models.autoencoder import LAST_LAYER, kl, vq
from ldm_jax.types import UserError, normal
from tests.models.tiny import count, random_params

TINY = dict(image_shape=(8, 12, 3), factor=4, latent_channels=2, width=8, num_res_blocks=1, dropout=0.1)


def test_parameters_of_the_published_autoencoder():
    assert count(kl((256, 256, 3), 8, mults=(1, 2, 4, 4))) == 83653863  # counted in the released weights of Stable Diffusion


F8, F16, F32 = ((256, 256, 3), 8), ((256, 256, 3), 16), ((256, 256, 3), 32)
DEEP = dict(mults=(1, 1, 2, 2, 4), attention=(16,))
PUBLISHED = {  # Rombach et al. 2022, table 8
    "kl-f4": kl((256, 256, 3), 4, 3, mults=(1, 2, 4)), "kl-f8": kl(*F8, 4, mults=(1, 2, 4, 4)), "kl-f16": kl(*F16, 16, **DEEP),
    "kl-f32": kl(*F32, 64, mults=(1, 1, 2, 2, 4, 4), attention=(16, 8)),
    "vq-f4": vq((256, 256, 3), 4, 3, mults=(1, 2, 4)), "vq-f8": vq(*F8, 4, codes=16384, mults=(1, 2, 2, 4), attention=(32,)),
    "vq-f16": vq(*F16, 8, codes=16384, **DEEP), "vq-f32": vq(*F32, 16, codes=16384, mults=(1, 1, 2, 2, 4, 4), attention=(16, 8))}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] if name in ("kl-f16", "vq-f16") else [])
                                  for name in sorted(PUBLISHED)])
def test_published_shapes(name):
    ae, side = PUBLISHED[name], 256 // int(name.split("-f")[1])
    params = jax.eval_shape(ae.init, jax.random.key(0))
    mean, logvar = jax.eval_shape(ae.posterior, params, jnp.zeros((2, 256, 256, 3)))
    assert mean.shape == logvar.shape == (2, *ae.latent_shape) and ae.latent_shape[:2] == (side, side)
    assert jax.eval_shape(ae.decode, params, mean).shape == (2, 256, 256, 3)


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
def test_the_last_layer_is_where_it_is_said_to_be(name):
    leaf = jax.eval_shape(AUTOENCODERS[name]((16, 16, 3), width=8).init, jax.random.key(0))
    for part in LAST_LAYER:
        leaf = leaf[part]
    assert leaf.shape[-1] == 3  # nothing comes after it: it makes the picture's channels


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


SMALL = dict(TINY, factor=2, mid_attention=False, codes=16)


@pytest.fixture(scope="module")
def tiny_vq():
    ae = vq(**SMALL)
    params = random_params(ae)
    return ae, {**params, "codebook": {"embedding": 5 * params["codebook"]["embedding"]}}  # of variance 1


def test_codes_are_the_decoders_first_layer(tiny_vq):
    """Latents decode as the codes nearest to them do, in bfloat16 too, where rounding z or the codes would choose others."""
    ae, params = tiny_vq
    codebook = params["codebook"]["embedding"].astype(np.float64)
    z = np.random.default_rng(1).normal(size=(3, 4, 6, 2)).astype(np.float32)
    z[0, 0, 0] = (0.5 + 1e-4) * codebook[3] + (0.5 - 1e-4) * codebook[np.argsort(((codebook - codebook[3]) ** 2).sum(1))[1]]
    nearest = codebook[((z[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)].astype(np.float32)
    assert np.all(nearest[0, 0, 0] == params["codebook"]["embedding"][3])
    for dtype, close in (("float32", 1e-5), ("bfloat16", 1e-6)):
        decode = jax.jit(vq(**SMALL, dtype=dtype).decode)
        image = decode(params, z)
        np.testing.assert_allclose(image, decode(params, nearest), atol=close)
        assert np.abs(image - decode(params, np.roll(nearest, 1, 0))).max() > 0.01


def test_the_codebooks_gradient_is_the_losses_and_the_latents_is_the_decoders(tiny_vq):
    """d decode / dz is that of the net at the codes: that at z = code, where quantising changes nothing."""
    ae, params = tiny_vq
    codebook = params["codebook"]["embedding"]
    z = np.broadcast_to(codebook[5], (2, 4, 6, 2))
    gradient = jax.jit(jax.grad(lambda params, z: jnp.sum(ae.decode(params, z) ** 2), (0, 1)))
    at, near = gradient(params, z), gradient(params, z + 1e-3)
    assert np.abs(at[1]).max() > 0.1 and np.all(np.asarray(at[0]["codebook"]["embedding"]) == 0)
    np.testing.assert_allclose(near[1], at[1], rtol=1e-3, atol=1e-4)


def test_a_fresh_codebook_has_the_spread_of_fresh_latents():
    ae = vq((16, 16, 3), 2, width=16, num_res_blocks=1, codes=512)
    params = ae.init(jax.random.key(0))
    z = jax.jit(ae.encode)(params, jax.random.uniform(jax.random.key(1), (8, 16, 16, 3), minval=-1.0))
    assert abs(np.std(params["codebook"]["embedding"]) - 1.0) < 0.05 and 0.3 < np.std(z) < 3.0


def test_posterior_and_draw_are_one_line_for_both_kinds(tiny, tiny_vq):
    x = jax.random.normal(jax.random.key(0), (3, 8, 12, 3))
    ae, params, encode, _ = tiny
    mean, logvar = encode(params, x)
    for got, want in zip(jax.jit(ae.posterior)(params, x), (mean, logvar)):
        np.testing.assert_array_equal(got, want)
    keys = jax.random.split(jax.random.key(1), 3)
    np.testing.assert_allclose(ae.draw(mean, logvar, keys), mean + np.exp(0.5 * logvar) * normal(keys, mean.shape), atol=1e-6)
    one = jax.random.key(2)
    eps = (ae.draw(mean, logvar, one) - mean) / np.exp(0.5 * logvar)
    np.testing.assert_allclose(eps, normal(one, mean.shape), atol=1e-3)

    ae, params = tiny_vq
    z = jax.jit(ae.encode)(params, x)
    mean, logvar = jax.jit(ae.posterior)(params, x)
    assert z.shape == (3, 4, 6, 2) and z.dtype == jnp.float32
    np.testing.assert_array_equal(ae.draw(mean, logvar, keys), z)


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


@pytest.mark.parametrize("codes", [0, -3, 2.5, None])
def test_a_number_of_codes_is_needed(codes):
    with pytest.raises(UserError, match="codes="):
        vq((32, 32, 3), codes=codes)


def test_an_image_that_does_not_fit_is_refused(tiny):
    ae, params, _, _ = tiny
    with pytest.raises(UserError, match="9x12.*factor=4"):
        ae.encode(params, jnp.ones((1, 9, 12, 3)))
