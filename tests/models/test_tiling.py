"""Tiles: what is local comes out as it would whole, and memory is that of a tile."""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import AUTOENCODERS, resampling, tiled
from ldm_jax.models.autoencoder import Autoencoder, kl
from ldm_jax.models.tiling import tiles
from ldm_jax.types import UserError
from tests.models.tiny import random_params


class Local(nn.Module):
    """Each latent position is a function of its 2x2 pixels alone, and back."""
    dtype: Any = jnp.float32

    def setup(self):
        self.into, self.out_of = nn.Dense(6), nn.Dense(3)

    def encode(self, x, train=False):
        return jnp.sin(self.into(resampling.downsample(x)))

    def decode(self, z, train=False):
        return jnp.sin(self.out_of(resampling.upsample(z)))

    def __call__(self, x):
        return self.decode(jnp.split(self.encode(x), 2, -1)[0])


LOCAL = Autoencoder(Local(), (8, 8, 3), (4, 4, 3), 2)


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("n, tile, overlap", [
    (64, 64, 16), (65, 64, 16), (112, 64, 16), (113, 64, 16), (200, 64, 0), (7, 4, 3), (128, 64, 0)])
def test_weights_sum_to_one(n, tile, overlap, scale):
    starts, weights = tiles(n, tile, overlap, scale)
    total = np.zeros(n * scale)
    for start, weight in zip(starts, weights):
        total[start * scale:start * scale + len(weight)] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    assert weights.min() > 0 and starts[0] == 0 and starts[-1] + min(n, tile) == n
    assert np.all(np.diff(starts) <= tile - overlap) and len(starts) == 1 + max(0, -((tile - n) // (tile - overlap)))


def test_the_ramp_is_linear():
    starts, weights = tiles(12, 8, 4)
    np.testing.assert_array_equal(starts, [0, 4])
    np.testing.assert_allclose(weights[0], [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125], atol=1e-6)
    np.testing.assert_allclose(weights[1], weights[0][::-1], atol=1e-6)


@pytest.mark.parametrize("h, w", [(9, 9), (11, 4), (3, 10), (8, 13)])
def test_what_is_local_is_the_same_in_tiles(h, w):
    params = random_params(LOCAL)
    pieces = tiled(LOCAL, tile=5, overlap=2)
    x = jax.random.normal(jax.random.key(0), (2, 2 * h, 2 * w, 3))
    for got, want in zip(jax.jit(pieces.encode)(params, x), LOCAL.encode(params, x)):
        assert got.shape == (2, h, w, 3)
        np.testing.assert_allclose(got, want, atol=1e-6)
    z = LOCAL.encode(params, x)[0]
    np.testing.assert_allclose(jax.jit(pieces.decode)(params, z), LOCAL.decode(params, z), atol=1e-6)


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
def test_it_stands_in_for_the_autoencoder(name):
    """All that systems ask of one is there; up to the size it is the same program, so the same bitwise."""
    whole = AUTOENCODERS[name]((16, 24, 3), 2, width=8, mults=(1, 1), num_res_blocks=1, mid_attention=False)
    pieces = tiled(whole, tile=16, overlap=6)
    assert (pieces.latent_shape, pieces.factor, pieces.image_shape, pieces.codes) == (
        whole.latent_shape, whole.factor, whole.image_shape, whole.codes)
    assert jax.tree.map(jnp.shape, jax.eval_shape(pieces.init, jax.random.key(0))) == jax.tree.map(
        jnp.shape, jax.eval_shape(whole.init, jax.random.key(0)))
    params, keys = random_params(whole), jax.random.split(jax.random.key(1), 2)

    def through(ae):
        def run(x):
            z = ae.draw(*ae.posterior(params, x), keys)
            return z, ae.decode(params, z)
        return jax.jit(run)

    small, large = (jax.random.normal(jax.random.key(2), (2, *size, 3)) for size in ((16, 32), (32, 44)))
    assert through(pieces).lower(small).as_text() == through(whole).lower(small).as_text()
    assert through(pieces).lower(large).as_text() != through(whole).lower(large).as_text()
    z, image = through(pieces)(large)
    assert z.shape == (2, 16, 22, whole.latent_shape[-1]) and image.shape == large.shape
    assert np.all(np.isfinite(image)) and np.std(image) > 0.01


def test_tiles_need_less_memory():
    ae = kl((32, 32, 1), 4, 2, width=8, mults=(1, 1, 1), num_res_blocks=1, mid_attention=False)
    params = jax.eval_shape(ae.init, jax.random.key(0))
    z = jax.ShapeDtypeStruct((1, 256, 256, 2), jnp.float32)
    peak = [jax.jit(a.decode).lower(params, z).compile().memory_analysis().temp_size_in_bytes for a in (ae, tiled(ae, 32, 8))]
    assert peak[1] < peak[0] / 5


def test_dropout_differs_between_tiles():
    """Were every tile given the same key, a constant latent would come out the same in each."""
    ae = kl((8, 16, 1), 1, 1, width=8, num_res_blocks=1, mid_attention=False, dropout=0.5)
    decode = lambda z: tiled(ae, 8, 0).decode(random_params(ae), z, True, {"dropout": jax.random.key(0)})
    left, right = np.split(np.asarray(jax.jit(decode)(jnp.ones((1, 8, 16, 1)))), 2, 2)
    assert np.abs(left - right).max() > 1e-3


@pytest.mark.parametrize("tile, overlap", [(8, 8), (8, -1), (0, 0)])
def test_an_overlap_that_does_not_fit_is_refused(tile, overlap):
    with pytest.raises(UserError, match=f"overlap={overlap}"):
        tiled(LOCAL, tile, overlap)
