"""First stages against AutoencoderKL and VQModel of diffusers, with random weights put into both."""
import re

import jax
import numpy as np
import pytest

from ldm_jax.models import quantizer
from ldm_jax.models.autoencoder import kl, vq
from tests.models.tiny import count

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIZE = (24, 16, 3)
WIDTHS, MULTS = (12, 12, 36), (1, 1, 3)
NAMES = [  # their names -> ours; levels of the decoder are counted from the latent there and from the image here
    (r"mid_block\.attentions\.0\.", "mid_attention."), (r"mid_block\.resnets\.(\d)\.", r"mid_block_\1."),
    (r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down_\1_block_\2."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv\.", r"down_\1_resample."),
    (r"up_blocks\.(\d)\.resnets\.(\d)\.", r"up_\1_block_\2."), (r"up_blocks\.(\d)\.upsamplers\.0\.conv\.", r"up_\1_resample."),
    (r"conv_norm_out", "norm_out"), (r"group_norm", "norm"), (r"to_out\.0", "out"), (r"to_([qkv])", r"\1"),
    (r"conv_shortcut", "skip"),
    (r"\b(norm|conv)([12])\b", r"\1_\2"), (r"^post_quant_conv", "quant_out"), (r"^quant_conv", "quant_in"),
    (r"^quantize\.embedding\.weight", "codebook.embedding"),
]


def convert(model, levels):
    """The state dict of a model of theirs as parameters of ours."""
    params = {}
    for name, value in model.state_dict().items():
        for old, new in NAMES:
            name = re.sub(old, new, name)
        name = re.sub(r"up_(\d)_", lambda m: f"up_{levels - 1 - int(m[1])}_", name)
        value = value.numpy()
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
            value = value[0, 0] if value.shape[:2] == (1, 1) else value
        elif name.endswith("weight") and value.ndim == 2:
            value = value.T
        name = re.sub(r"\bweight$", "scale" if value.ndim == 1 else "kernel", name)
        *path, last = name.split(".")
        place = params
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return params


def theirs(kind, levels=3, **options):
    """A model of theirs, built here or only in shapes, in evaluation mode."""
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    return kind(**blocks, **options).eval()


def randomise(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, p in model.named_parameters():
            if name.startswith("quantize"):
                p.data.normal_()
            elif p.ndim > 1:
                p.data.normal_(std=float(np.prod(p.shape[1:])) ** -0.5)
            else:
                p.data.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model


def nchw(a):
    return torch.from_numpy(np.array(a).transpose(0, 3, 1, 2))


def nhwc(a):
    return a.detach().numpy().transpose(0, 2, 3, 1)


def same_tree(ours, params):
    want = jax.tree.map(lambda a: a.shape, jax.eval_shape(ours.init, jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == want  # every parameter has its place, and none is left over


SMALL = dict(block_out_channels=WIDTHS, norm_num_groups=6)
OURS = dict(width=12, mults=MULTS, norm_groups=6)
IMAGE = np.random.default_rng(0).uniform(-1, 1, (2, *SIZE)).astype(np.float32)


@torch.no_grad()
def test_kl():
    model = randomise(theirs(diffusers.AutoencoderKL, latent_channels=5, layers_per_block=2, **SMALL))
    ours, params = kl(SIZE, 4, 5, num_res_blocks=2, **OURS), convert(model, 3)
    same_tree(ours, params)
    mean, logvar = jax.jit(ours.encode)(params, IMAGE)
    posterior = model.encode(nchw(IMAGE)).latent_dist
    np.testing.assert_allclose(mean, nhwc(posterior.mean), atol=1e-4)
    np.testing.assert_allclose(logvar, nhwc(posterior.logvar), atol=1e-4)
    image = jax.jit(ours.decode)(params, mean)
    np.testing.assert_allclose(image, nhwc(model.decode(nchw(mean)).sample), atol=1e-4)
    assert min(np.std(mean), np.std(logvar), np.std(image)) > 0.1


@torch.no_grad()
def test_vq():
    model = randomise(theirs(diffusers.VQModel, latent_channels=3, layers_per_block=1, num_vq_embeddings=1500, **SMALL))
    ours, params = vq(SIZE, 4, 3, codes=1500, num_res_blocks=1, **OURS), convert(model, 3)
    same_tree(ours, params)
    z = jax.jit(ours.encode)(params, IMAGE)
    np.testing.assert_allclose(z, nhwc(model.encode(nchw(IMAGE)).latents), atol=1e-4)
    many = np.random.default_rng(1).normal(size=(2, 24, 16, 3)).astype(np.float32)
    for latents in (z, many):
        quantized, ids = quantizer.quantize(params["codebook"]["embedding"], latents)
        their_z, _, (_, _, their_ids) = model.quantize(nchw(latents))
        np.testing.assert_array_equal(np.asarray(ids).reshape(-1), their_ids.reshape(-1))
        np.testing.assert_allclose(quantized, nhwc(their_z), atol=1e-6)
    assert len(set(np.asarray(ids).reshape(-1).tolist())) > 300
    image = jax.jit(ours.decode)(params, z)
    np.testing.assert_allclose(image, nhwc(model.decode(nchw(z)).sample), atol=1e-4)
    assert min(np.std(z), np.std(image)) > 0.1


@pytest.mark.parametrize("kind, ours, options", [
    ("VQModel", vq((256, 256, 3), mults=(1, 2, 4)),
     dict(levels=3, block_out_channels=(128, 256, 512), latent_channels=3, num_vq_embeddings=8192)),
    ("AutoencoderKL", kl((256, 256, 3), 8, mults=(1, 2, 4, 4)),
     dict(levels=4, block_out_channels=(128, 256, 512, 512), latent_channels=4)),
], ids=["vq-f4", "kl-f8"])
def test_published_sizes(kind, ours, options):
    with torch.device("meta"):
        model = theirs(getattr(diffusers, kind), layers_per_block=2, **options)
    assert count(ours) == sum(p.numel() for p in model.parameters())
