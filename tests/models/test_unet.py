"""The U-Net: published sizes, masks, and what it refuses."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import layers
from ldm_jax.models.unet import UNETS, SpatialTransformer, unet
from ldm_jax.types import UserError
from tests.models.tiny import random_params

# Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, in millions, with one row less in the class table; the released weights of
# Rombach et al. 2022 and Podell et al. 2023, counted.
PUBLISHED = {"ddpm_cifar": (35.7e6, 0.05e6), "adm_64": (296e6, 0.5e6), "adm_128": (422e6, 0.5e6), "adm_256": (554e6, 0.5e6),
             "sd_1": (859520964, 0), "sd_2": (865910724, 0), "sdxl": (2567463684, 0)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] if name in ("adm_128", "adm_256") else [])
                                  for name in sorted(UNETS)])
def test_published_sizes(name):
    """The number of parameters, and the shape of the output for every condition that the network takes."""
    net, spec = unet(**UNETS[name]), jax.ShapeDtypeStruct
    params, (want, tolerance) = jax.eval_shape(net.init, jax.random.key(0)), PUBLISHED[name]
    assert abs(sum(a.size for a in jax.tree.leaves(params)) - want) <= tolerance
    cond = {key: spec(shape, dtype) for key, shape, dtype, size in (
        ("class", (2,), jnp.int32, net.num_classes), ("context", (2, 77, net.context_dim), jnp.float32, net.context_dim),
        ("vector", (2, net.vector_dim), jnp.float32, net.vector_dim)) if size}
    out = jax.eval_shape(net.apply, params, spec((2, *net.image_shape), jnp.float32), spec((2,), jnp.float32), cond)
    assert out.shape == (2, *net.image_shape[:2], net.out_channels) and out.dtype == jnp.float32


def test_cross_attention_reads_the_context_and_skips_masked_tokens():
    transformer = SpatialTransformer(depth=1, num_heads=2)
    rng = np.random.default_rng(0)
    x, context = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 4, 2, 8), (2, 5, 6)))
    mask = jnp.asarray([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)[:, None, None]
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape), jnp.float32),
                          jax.eval_shape(transformer.init, jax.random.key(0), x, context))
    grad = jax.jit(jax.grad(lambda c: jnp.sum(transformer.apply(params, x, c, mask) ** 2)))(context)
    seen = np.abs(grad).max(-1)
    assert np.all((seen > 1e-6) == np.asarray(mask[:, 0, 0])) and np.all(seen[~np.asarray(mask[:, 0, 0])] == 0)


def test_a_context_net_runs_from_sequence_to_image():
    net = unet((4, 4, 2), width=8, mults=(1,), num_res_blocks=1, attention=(4,), transformer_depth=1, context_dim=6)
    params, x, t = random_params(net), jnp.ones((2, 4, 4, 2)), jnp.array([0.3, 0.6])
    apply = jax.jit(net.apply)
    context = jax.random.normal(jax.random.key(0), (2, 3, 6))
    mask = jnp.array([[True, True, False]] * 2)
    out = apply(params, x, t, {"context": context, "context_mask": mask})
    np.testing.assert_allclose(apply(params, x, t, {"context": context.at[:, 2].set(9.0), "context_mask": mask}), out, atol=1e-5)
    assert np.abs(apply(params, x, t, {"context": context.at[:, 1].set(9.0), "context_mask": mask}) - out).max() > 1e-3


@pytest.mark.parametrize("depth, compared", [(0, "full"), (1, "dots")])
def test_remat_changes_no_number(depth, compared):
    """Values and gradients are those without it; "full" convolves again in the backward pass, "dots" does not."""
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 4, 1)), jnp.array([0.3, 0.6])
    nets = {remat: unet((4, 4, 1), width=8, mults=(1,), num_res_blocks=1, transformer_depth=depth, remat=remat)
            for remat in sorted(layers.REMAT)}
    params = random_params(nets["none"])
    runs = {remat: jax.jit(jax.value_and_grad(lambda args, net=net: jnp.sum(net.apply(*args, t) ** 2))).lower((params, x))
            for remat, net in nets.items()}
    text = {remat: run.as_text() for remat, run in runs.items()}
    convolutions = {remat: lines.count("stablehlo.convolution") for remat, lines in text.items()}
    assert convolutions["full"] > convolutions["none"] == convolutions["dots"]
    barriers = {remat: lines.count("optimization_barrier") for remat, lines in text.items()}
    assert min(barriers["dots"], barriers["full"]) > barriers["none"]
    got, want = (runs[remat].compile()((params, x)) for remat in (compared, "none"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max())), got, want)


@pytest.mark.parametrize("padding, before", [("SAME", 0), (1, 1)])
def test_where_strided_convolutions_pad(padding, before):
    """DDPM and the first stages pad right and below, the LDM U-Net all around: against a direct sum in float64."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, 6, 4, 2)), rng.standard_normal((3, 3, 2, 5))
    padded = np.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    want = np.stack([[np.einsum("ijc,ijco->o", padded[0, 2 * r:2 * r + 3, 2 * s:2 * s + 3], kernel) for s in range(2)]
                     for r in range(3)])

    class Strided(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, x):
            return layers.conv(5, "conv", jnp.float32, stride=2, padding=padding)(x)
    got = Strided().apply({"params": {"conv": {"kernel": jnp.float32(kernel), "bias": jnp.zeros(5)}}}, jnp.float32(x))
    np.testing.assert_allclose(got[0], want, atol=1e-4)


@pytest.mark.parametrize("kwargs, words", [
    (dict(image_shape=(28, 28, 1)), "28x28.*divisible by 8"),
    (dict(image_shape=(32, 30, 3)), "32x30.*divisible by 8"),
    (dict(image_shape=(32, 32, 3), attention=(12,)), "attention=.*32, 16, 8, 4"),
    (dict(image_shape=(32, 32, 3), transformer_depth=(1, 2)), "transformer_depth=.*4 levels"),
    (dict(image_shape=(32, 32, 3), context_dim=8), "context_dim=8 needs transformer_depth"),
    (dict(image_shape=(32, 32, 3), resample="bilinear"), "bilinear.*block, conv, conv_centred"),
    (dict(image_shape=(32, 32, 3), time_order="cos"), "cos_sin, sin_cos"),
    (dict(image_shape=(32, 32, 3), width=30, norm_groups=32), "norm_groups=32"),
    (dict(image_shape=(32, 32, 3), width=33), "width=33"),
    (dict(image_shape=(32, 32, 3), head_width=96), "head_width=96"),
    (dict(image_shape=(32, 32, 3), remat=True), "remat True.*dots, full, none"),
])
def test_what_does_not_fit_is_refused_by_name(kwargs, words):
    with pytest.raises(UserError, match=words):
        unet(**kwargs)
