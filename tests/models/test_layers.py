"""The shared pieces against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import layers, resampling
from ldm_jax.models.init import POOLED, fan_avg, initialise, small, spread, unit

RNG = np.random.default_rng(0)


def test_timestep_embedding_in_both_orders():
    time, dim = np.array([0.0, 1.0, 37.5, 1000.0]), 10
    for order, n in (("cos_sin", 5), ("sin_cos", 4)):
        angles = time[:, None] * 10000.0 ** (-np.arange(5) / n)
        cos, sin = np.cos(angles), np.sin(angles)
        want = np.concatenate([cos, sin] if order == "cos_sin" else [sin, cos], 1)
        np.testing.assert_allclose(layers.timestep_embedding(jnp.asarray(time), dim, order), want, atol=1e-4)


@pytest.mark.parametrize("channels, want", [(2, 1), (4, 1), (8, 2), (20, 5), (32, 8), (64, 16), (96, 24), (128, 32), (192, 32),
                                            (320, 32), (960, 32)])
def test_groups_adapt_to_the_width(channels, want):
    assert layers.num_groups(channels) == want and layers.num_groups(channels, 2) == 2


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("size", [(4, 5), (7, 7), (16, 32)])
def test_group_norm_with_scale_and_shift(size, offset):
    x = np.float64(np.float32(RNG.standard_normal((3, *size, 12)) + offset))
    scale, bias, g, s = (RNG.standard_normal(shape) for shape in ((12,), (12,), (3, 12), (3, 12)))
    groups = x.reshape(3, -1, 3, 4)
    want = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    want = (want.reshape(x.shape) * scale + bias) * (1 + g[:, None, None]) + s[:, None, None]
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    got = layers.GroupNorm().apply({"params": params}, jnp.asarray(x), (jnp.asarray(g), jnp.asarray(s)))
    np.testing.assert_allclose(got, want, atol=3e-4 if offset else 1e-5)


def test_layer_and_rms_norm():
    x, scale, bias = RNG.standard_normal((2, 3, 6)) + 2, RNG.standard_normal(6), RNG.standard_normal(6)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layers.LayerNorm(affine=False).apply({}, jnp.asarray(x)), want, atol=1e-5)
    np.testing.assert_allclose(layers.LayerNorm().apply({"params": params}, jnp.asarray(x)), want * scale + bias, atol=1e-5)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(layers.RMSNorm().apply({"params": {"scale": params["scale"]}}, jnp.asarray(x)), want, atol=1e-5)


def test_resampling():
    x = RNG.standard_normal((2, 4, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(resampling.upsample(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2))
    want = sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    np.testing.assert_allclose(resampling.downsample(jnp.asarray(x)), want, atol=1e-6)


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block(resample, scale_shift):
    """Against the same block in numpy, its convolutions reduced to their centre so that they are matrix products."""
    x, emb = RNG.standard_normal((2, 4, 4, 8)), RNG.standard_normal((2, 6))
    block = layers.ResBlock(12, scale_shift=scale_shift, resample=resample)
    params = jax.tree.map(lambda a: RNG.standard_normal(a.shape), jax.eval_shape(block.init, jax.random.key(0), x, emb)["params"])
    for name in ("conv_1", "conv_2"):
        centre = np.zeros_like(params[name]["kernel"])
        centre[1, 1] = params[name]["kernel"][1, 1]
        params[name]["kernel"] = centre

    def norm(a, p, groups):
        g = a.reshape(2, -1, groups, a.shape[-1] // groups)
        g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + 1e-5)
        return g.reshape(a.shape) * p["scale"] + p["bias"]
    silu = lambda a: a / (1 + np.exp(-a))
    linear = lambda a, p: a @ p["kernel"].reshape(p["kernel"].shape[-2:] if p["kernel"].ndim == 2 else (-1,)) + p["bias"]
    conv = lambda a, p: a @ p["kernel"][1, 1] + p["bias"]
    resize = {None: lambda a: a, "up": lambda a: a.repeat(2, 1).repeat(2, 2),
              "down": lambda a: sum(a[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4}[resample]

    h = conv(resize(silu(norm(x, params["norm_1"], 2))), params["conv_1"])
    e = linear(emb, params["emb"])[:, None, None]
    if scale_shift:
        h = norm(h, params["norm_2"], 3) * (1 + e[..., :12]) + e[..., 12:]
    else:
        h = norm(h + e, params["norm_2"], 3)
    want = linear(resize(x), params["skip"]) + conv(silu(h), params["conv_2"])
    got = block.apply({"params": jax.tree.map(jnp.float32, params)}, jnp.float32(x), jnp.float32(emb))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_initialise_gives_each_parameter_its_own_noise_and_spread():
    import flax.linen as nn

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = layers.dense(300, f"pooled_{i}", jnp.float32)(x)  # 90,000 values each
            for i in range(2):
                x = layers.dense(1000, f"alone_{i}", jnp.float32, init=small)(layers.dense(1000, f"wide_{i}", jnp.float32)(x))
            return nn.Embed(50, 1000, embedding_init=unit, name="table")(jnp.zeros(1, int)) + layers.LayerNorm(name="norm")(x)

    assert 300 * 300 <= POOLED < 1000 * 1000
    params = initialise(Two(), jax.random.key(0), jnp.zeros((1, 300)))
    flat = {"/".join(k.key for k in path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(params)}
    std = lambda name: (flat[name].std(), flat[name].mean())
    for name, want in (("pooled_0/kernel", (2 / 600) ** 0.5), ("pooled_1/kernel", (2 / 600) ** 0.5),
                       ("wide_1/kernel", (2 / 2000) ** 0.5), ("alone_0/kernel", 0.02), ("table/embedding", 1.0)):
        got, mean = std(name)
        assert got == pytest.approx(want, rel=0.02) and abs(mean) < 0.02 * want
        assert np.abs(flat[name]).max() <= 3**0.5 * want * 1.0001
    assert np.all(flat["norm/scale"] == 1) and not flat["norm/bias"].any() and not flat["wide_0/bias"].any()
    for a, b in (("pooled_0", "pooled_1"), ("alone_0", "alone_1"), ("alone_0", "wide_1")):
        correlation = np.corrcoef(flat[a + "/kernel"].ravel(), flat[b + "/kernel"].ravel())[0, 1]
        assert abs(correlation) < 0.02
    again = initialise(Two(), jax.random.key(1), jnp.zeros((1, 300)))
    assert np.abs(again["pooled_0"]["kernel"] - flat["pooled_0/kernel"]).max() > 0.01


def test_initialisers_draw_by_themselves():
    key = jax.random.key(0)
    assert np.std(fan_avg(key, (3, 3, 20, 30))) == pytest.approx((2 / (9 * 50)) ** 0.5, rel=0.05)
    assert np.std(spread(lambda shape: 2.0)(key, (100, 100))) == pytest.approx(2.0, rel=0.05)
