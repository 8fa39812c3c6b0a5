"""Networks that diffusers builds and saves with random weights, read by `load_net`: the same outputs from the files alone."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.dit import dit
from ldm_jax.models.unet import unet
from ldm_jax.published import BUILDERS, load_net, save_net
from ldm_jax.types import UserError
from ldm_jax.weights import layouts, rules
from tests.models.tiny import random_params

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4  # of the largest value


def randomise(model, seed=0):
    """No parameter is zero, nor such that a sum explodes."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.startswith(("quantize", "time_proj")) or "embedding_table" in name or name == "class_embedding.weight":
            p.data = noise
        elif p.ndim > 1:
            p.data = noise * float(np.prod(p.shape[1:])) ** -0.5
        else:
            p.data = 0.2 * noise + float("norm" in name and name.endswith("weight"))
    return model.eval()


def published(folder, model, **options):
    """(the reference and what it opens of what we wrote, our net, its parameters), from a directory that it saves."""
    model.save_pretrained(folder)
    net, params = load_net(str(folder), **options)
    return (model, written(model, net, params, folder)), net, params


def written(model, net, params, folder):
    """Out again: under the published config the very names and bits that came in, and a directory that the reference opens."""
    config, layout = layouts.read_config(str(folder)), layouts.LAYOUTS[type(model).__name__]
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    arguments = layout.arguments(config, state)
    saved = rules.save(layout.rules(arguments, config), params)
    assert set(saved) == set(state)
    for name, value in state.items():
        assert saved[name].shape == value.shape and np.array_equal(saved[name], value), name
    save_net(str(folder / "again"), net, params)
    again, report = type(model).from_pretrained(folder / "again", output_loading_info=True)
    assert not any(report.values()), report
    return again.eval()


def nchw(a):
    return torch.from_numpy(np.array(a).transpose(0, 3, 1, 2))


def close(ours, models, run):
    """Ours is what the reference gives, and what it gives with the weights and the config that we wrote."""
    theirs, again = (run(model).detach().numpy().transpose(0, 2, 3, 1) for model in models)
    ours = np.asarray(ours)
    np.testing.assert_allclose(again, theirs, atol=TOLERANCE * np.abs(theirs).max(), rtol=0)
    assert ours.shape == theirs.shape and np.std(theirs) > 0.05
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * np.abs(theirs).max(), rtol=0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


STEPS = np.array([3, 871])
TIMES = (STEPS + 1) / 1000

TYPES = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
CODERS = {
    "kl": (diffusers.AutoencoderKL, dict(TYPES, block_out_channels=(12, 20), norm_num_groups=4, latent_channels=3,
                                         layers_per_block=2, scaling_factor=0.3, shift_factor=0.2, sample_size=20)),
    "kl-attends": (diffusers.AutoencoderKL, dict(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16), norm_num_groups=8, in_channels=2, out_channels=4, use_quant_conv=False,
        mid_block_add_attention=False, act_fn="mish", latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])),
    "vq": (diffusers.VQModel, dict(TYPES, block_out_channels=(12, 20), norm_num_groups=4, latent_channels=6, vq_embed_dim=3,
                                   num_vq_embeddings=50, mid_block_add_attention=False, lookup_from_codebook=True)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CODERS)
def test_first_stages(name, tmp_path):
    kind, options = CODERS[name]
    models, net, params = published(tmp_path, randomise(kind(**options)))
    config = models[0].config
    image = normal(2, 12, 20, config.in_channels)
    z = jax.jit(net.encode)(params, image)
    if name == "vq":
        close(z, models, lambda model: model.encode(nchw(image)).latents)
    else:
        close(z[0], models, lambda model: model.encode(nchw(image)).latent_dist.mean)
        close(z[1], models, lambda model: model.encode(nchw(image)).latent_dist.logvar)
        z = z[0]
    close(jax.jit(net.decode)(params, z), models, lambda model: model.decode(nchw(z)).sample)
    latents = normal(1, 2, 2, z.shape[-1])
    if name == "kl":
        np.testing.assert_allclose((latents - net.shift) * net.scale, (latents - 0.2) * 0.3, rtol=1e-6)
    if name == "kl-attends":  # what pipelines undo as latents * std / scaling_factor + mean
        diffused = (latents - np.array(net.shift)) * np.array(net.scale)
        np.testing.assert_allclose(diffused * config.latents_std / 0.18215 + config.latents_mean, latents, rtol=1e-5)


BLOCKS = dict(norm_num_groups=4, block_out_channels=(12, 20), layers_per_block=1)
CROSS = dict(BLOCKS, sample_size=8, cross_attention_dim=10, attention_head_dim=2,
             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
CONDITION = {
    "sd1": dict(CROSS),
    "sd2": dict(CROSS, attention_head_dim=[3, 5], use_linear_projection=True, upcast_attention=True,
                down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2),
    "inpainting": dict(CROSS, in_channels=9, only_cross_attention=[True, False]),
    "upscaler": dict(CROSS, in_channels=7, num_class_embeds=11, norm_eps=1e-3, downsample_padding=0, layers_per_block=[2, 1],
                     only_cross_attention=True),
    "sdxl": dict(CROSS, transformer_layers_per_block=[1, 2], attention_head_dim=[2, 4], addition_embed_type="text_time",
                 addition_time_embed_dim=6, projection_class_embeddings_input_dim=7 + 6 * 6, time_cond_proj_dim=5,
                 use_linear_projection=True, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), flip_sin_to_cos=False, freq_shift=1),
    "asymmetric": dict(CROSS, transformer_layers_per_block=[[2], 1], reverse_transformer_layers_per_block=[1, [1, 2]],
                       attention_head_dim=8, mid_block_scale_factor=1.5, resnet_time_scale_shift="scale_shift", act_fn="mish"),
    "adm-blocks": dict(CROSS, down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), attention_head_dim=[10, 4],
                       up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_out_scale_factor=1.3,
                       resnet_skip_time_act=True, mid_block_type="UNetMidBlock2D", class_embed_type="timestep", act_fn="gelu",
                       conv_in_kernel=1, conv_out_kernel=5, time_embedding_act_fn="silu", timestep_post_act="gelu"),
    "projection": dict(CROSS, class_embed_type="projection", projection_class_embeddings_input_dim=9, encoder_hid_dim=14,
                       encoder_hid_dim_type="text_proj", center_input_sample=True, mid_block_type=None, time_embedding_dim=26),
    "simple": dict(CROSS, class_embed_type="simple_projection", projection_class_embeddings_input_dim=9,
                   class_embeddings_concat=True, time_embedding_type="fourier", block_out_channels=(13, 20), norm_num_groups=1,
                   attention_head_dim=5),
    "identity": dict(CROSS, class_embed_type="identity", down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                     mid_block_type="UNetMidBlock2D", block_out_channels=(15, 20), norm_num_groups=5),
}


def condition(config, B=2):
    """(conditions of ours, arguments of theirs, sizes of the image) for a config."""
    ours, theirs = {}, {"encoder_hidden_states": torch.zeros(B, 1, 1)}
    if "Cross" in str(config.get("down_block_types")) or config.get("mid_block_type", "Cross") == "UNetMidBlock2DCrossAttn":
        ours["context"] = normal(B, 7, config.get("encoder_hid_dim") or config["cross_attention_dim"], seed=1)
        mask = np.arange(7)[None] < np.array([[4], [7]])
        ours["context_mask"] = mask
        theirs.update(encoder_hidden_states=torch.from_numpy(ours["context"]), encoder_attention_mask=torch.from_numpy(mask))
    if config.get("addition_embed_type"):
        ours["vector"], ours["time_ids"] = normal(B, 7, seed=2), np.float32([[512, 384, 0, 8, 512, 512]] * B)
        theirs["added_cond_kwargs"] = dict(text_embeds=torch.from_numpy(ours["vector"]),
                                           time_ids=torch.from_numpy(ours["time_ids"]))
        ours["time_cond"] = normal(B, 5, seed=3)
        theirs["timestep_cond"] = torch.from_numpy(ours["time_cond"])
    kind = config.get("class_embed_type")
    if kind is None and config.get("num_class_embeds") or kind == "timestep":
        ours["class"] = np.array([4, 10])
        theirs["class_labels"] = torch.from_numpy(ours["class"])
    elif kind:
        ours["vector"] = normal(B, 60 if kind == "identity" else 9, seed=2)
        theirs["class_labels"] = torch.from_numpy(ours["vector"])
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("name", CONDITION)
def test_condition(name, tmp_path):
    config = CONDITION[name]
    models, net, params = published(tmp_path, randomise(diffusers.UNet2DConditionModel(**config)), attention_impl="einsum")
    x = normal(2, *((9, 7) if name == "sd1" else (8, 4)), models[0].config.in_channels)  # also where a size is odd
    ours, theirs = condition(config)
    C = net.image_shape[-1]
    if name == "inpainting":
        ours["concat"], mine = x[..., C:], x[..., :C]
    else:
        mine = x
    out = jax.jit(net.apply)(params, mine, jnp.asarray(TIMES if net.timesteps else STEPS, jnp.float32), ours)
    close(out, models, lambda model: model(nchw(x), torch.from_numpy(STEPS), **theirs).sample)


SKIPS = dict(down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
             block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=None, time_embedding_type="fourier",
             mid_block_scale_factor=1.41421356, norm_eps=1e-6, attention_head_dim=None, sample_size=8, freq_shift=0)
PLAIN = {
    "ddpm": dict(BLOCKS, sample_size=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), downsample_padding=0,
                 up_block_types=("AttnUpBlock2D", "UpBlock2D"), flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
                 attention_head_dim=None),
    "ldm-upscaler": dict(BLOCKS, sample_size=8, in_channels=6, down_block_types=("AttnDownBlock2D",) * 2,
                         up_block_types=("AttnUpBlock2D",) * 2, attention_head_dim=8, num_class_embeds=12),
    "adm": dict(BLOCKS, sample_size=8, out_channels=6, down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=4, downsample_type="resnet",
                upsample_type="resnet", resnet_time_scale_shift="scale_shift", class_embed_type="timestep", act_fn="gelu"),
    "no-middle": dict(BLOCKS, sample_size=(8, 4), down_block_types=("AttnDownBlock2D", "DownBlock2D"), mid_block_type=None,
                      up_block_types=("UpBlock2D", "AttnUpBlock2D"), downsample_type="resnet", upsample_type="conv",
                      attention_head_dim=4, time_embedding_type="learned", num_train_timesteps=1000, time_embedding_dim=14),
    "bare-middle": dict(BLOCKS, sample_size=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                        add_attention=False, class_embed_type="identity", center_input_sample=True, block_out_channels=(15, 20),
                        norm_num_groups=5),
    "mid-groups": dict(BLOCKS, sample_size=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                       attn_norm_num_groups=10, attention_head_dim=10, mid_block_scale_factor=2.0, layers_per_block=2),
    "score-sde": SKIPS,
}


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_plain(name, tmp_path):
    config = PLAIN[name]
    models, net, params = published(tmp_path, randomise(diffusers.UNet2DModel(**config)))
    if name == "score-sde":  # its time is the noise level
        steps = times = np.float32([0.3, 50.0])
    else:
        steps, times = STEPS, np.float32(TIMES)
    x = normal(2, 8, 4, models[0].config.in_channels)
    ours, theirs = condition(dict(config, mid_block_type=None))
    theirs.pop("encoder_hidden_states")
    out = jax.jit(net.apply)(params, x, times, ours)
    close(out, models, lambda model: model(nchw(x), torch.from_numpy(steps), **theirs).sample)


DIT = dict(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
           num_embeds_ada_norm=10)
DITS = {
    "dit": (diffusers.DiTTransformer2DModel, DIT),
    "options": (diffusers.DiTTransformer2DModel, dict(DIT, activation_fn="geglu", attention_bias=False,
                                                      norm_elementwise_affine=True, norm_eps=1e-3, upcast_attention=True,
                                                      patch_size=4, dropout=0.1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name, equal", [("dit", False), ("dit", True), ("options", True)])
def test_dit(name, equal, tmp_path):
    kind, options = DITS[name]
    model = randomise(kind(**options))
    if equal:
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    models, net, params = published(tmp_path, model)
    if equal:
        net, params = load_net(str(tmp_path), scan_layers=True)
    assert ("class" in params) == equal
    for size in ((8, 16) if name == "dit" and not equal else (8,)):  # positions of another size than the config's
        x, labels = normal(2, size, size, 3), np.array([3, 10])
        out = jax.jit(net.apply)(params, x, jnp.asarray(TIMES, jnp.float32), labels)
        close(out, models, lambda model: model(nchw(x), torch.from_numpy(STEPS), torch.from_numpy(labels)).sample)


SMALL = dict(width=8, mults=(1, 2), num_res_blocks=1, attention=(4,), norm_groups=4, timesteps=1000)
OWN = {  # nets of ours and what the reference calls them
    "adm": (unet((8, 8, 3), 10, 6, **SMALL, resample="block", scale_shift=True, head_width=4, time_order="cos_sin",
                 norm_eps=1e-6),
            diffusers.UNet2DModel),
    "ldm": (unet((8, 8, 4), **SMALL, resample="conv_centred", transformer_depth=2, context_dim=6, num_heads=2, vector_dim=5,
                 concat_channels=2), diffusers.UNet2DConditionModel),
    "dit": (dit((8, 8, 2), 4, width=16, depth=2, num_heads=2, mlp="geglu", mlp_ratio=6.0, time_shift=1.0),
            diffusers.DiTTransformer2DModel),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_nets_of_ours_open_there(name, tmp_path):
    net, kind = OWN[name]
    params = random_params(net)
    save_net(str(tmp_path), net, params)
    model = kind.from_pretrained(tmp_path).eval()
    x = normal(2, 8, 8, net.image_shape[-1] + (net.concat_channels or 0))
    ours, theirs = {"class": np.array([1, net.num_classes or 0])}, {"class_labels": torch.tensor([1, net.num_classes or 0])}
    if name == "ldm":
        ours = {"context": normal(2, 3, 6), "vector": normal(2, 5)}
        theirs = dict(encoder_hidden_states=torch.from_numpy(ours["context"]), class_labels=torch.from_numpy(ours["vector"]))
    time = jnp.asarray(TIMES * (1 if net.timesteps else 1000) - (0 if net.timesteps else 1), jnp.float32)
    out = jax.jit(dataclasses.replace(net, time_scale=1.0).apply)(params, x, time, ours)
    close(out, (model, model), lambda m: m(nchw(x), timestep=torch.from_numpy(STEPS), **theirs).sample)


@pytest.mark.parametrize("net, words", [
    (unet((8, 8, 3), width=8, mults=(1, 4), num_res_blocks=1), r"normalised in .2, 4, 6?.*norm_groups=2"),
    (unet((8, 8, 3), **SMALL, mid_attention=False, transformer_depth=1, context_dim=4), "no UNet2DConditionModel .* middle"),
    (dit((8, 8, 2), 4, width=16, depth=1, num_heads=2, time_shift=1.0, norm="rms"), "no DiTTransformer2DModel .* norm is 'rms'"),
    (dit((8, 8, 2), 4, width=16, depth=1, num_heads=2), "time_shift is 0.0 and would become 1.0"),
])
def test_nets_without_a_counterpart_are_not_written(net, words, tmp_path):
    with pytest.raises(UserError, match=words):
        save_net(str(tmp_path / "out"), net, random_params(net))
    assert not (tmp_path / "out").exists()


SD = dict(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
XL = dict(sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
          down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
          up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=[1, 2, 10],
          addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
FULL = {
    "sd1": ("UNet2DConditionModel", SD, 859_520_964), "sdxl": ("UNet2DConditionModel", XL, 2_567_463_684),
    "dit": ("DiTTransformer2DModel", dict(in_channels=4, out_channels=8), 674_834_720),  # and 294,912 fixed positions
}


class Blank:
    """An array of a shape and nothing else, all zeros when it is read."""
    def __init__(self, tensor):
        self.shape, self.dtype = tuple(tensor.shape), np.dtype(np.float32)

    def __array__(self, dtype=None, copy=None):
        return np.broadcast_to(np.float32(0), self.shape)


@pytest.mark.parametrize("name", FULL)
def test_published_sizes_by_name_and_shape(name):
    """Every array of the full-size reference has its place in ours, and every parameter of ours its array."""
    kind, options, count = FULL[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**options)
    config, layout = {**model.config}, layouts.LAYOUTS[kind]
    arrays = {key: Blank(value) for key, value in model.state_dict().items()}
    arguments = layout.arguments(config, arrays)
    net = BUILDERS[layout.builder](**arguments)
    want = rules.flatten(jax.eval_shape(net.init, jax.random.key(0)))
    rules.check(layout.rules(arguments, config), arrays, want)
    assert sum(a.size for a in want.values()) == count
