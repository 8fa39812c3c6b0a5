"""Models in their authors' own layouts: every row is a net that can be built and sampled, and what does not fit is refused by name."""
import json

import numpy as np
import pytest

from ldm_jax.models.dit import sincos_positions
from ldm_jax.pipelines.originals import FAMILIES, load_original
from ldm_jax.types import UserError
from ldm_jax.weights import original_autoencoder, original_bert, original_clip, original_dit, original_unet, originals, schedulers
from ldm_jax.weights.stored import write_safetensors
from tests.weights.named import names

UNET = dict(model_channels=32, channel_mult=(1,), attention_resolutions=(), num_res_blocks=1)
PLAIN = dict(layout="adm_256_uncond", image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1", attention_resolutions="",
             num_head_channels=16)
CODER = dict(ch=32, ch_mult=(1,), num_res_blocks=1, resolution=8)
LATENT = dict(layout="ldm_ffhq256", image_size=8, unet_config=dict(params=dict(UNET, num_head_channels=16)),
              first_stage_config=dict(params=dict(n_embed=5, ddconfig=CODER)))
DIT = dict(layout="dit_s_2_256", input_size=4, hidden_size=8, depth=1, num_heads=2)
FLAGS = {*original_unet.FLAGS, *original_unet.FLAGS_NO_EFFECT}


def of_adm(config):
    flags = originals.original_config(config)[1]
    arguments = original_unet.adm_arguments({key: value for key, value in flags.items() if key in FLAGS})
    order = "new" if flags.get("use_new_attention_order") else "legacy"
    return "unet_of_levels", arguments, original_unet.unet_rules(arguments, order)


def of_ldm(config):
    said = originals.ldm_options(originals.original_config(config)[1])
    _, unet = originals.target(said["unet_config"], "unet_config")
    arguments = original_unet.ldm_arguments(unet, (said["image_size"],) * 2 + (said["channels"],))
    return "unet_of_levels", arguments, original_unet.unet_rules(arguments, linear_projection=bool(unet.get("use_linear_in_transformer")))


def of_coder(config):
    said = originals.ldm_options(originals.original_config(config)[1])
    builder, arguments = original_autoencoder.autoencoder_arguments(*originals.target(said["first_stage_config"], ""), 1.0)
    return builder, arguments, original_autoencoder.autoencoder_rules(arguments)


def of_dit(config):
    arguments = original_dit.dit_arguments(originals.original_config(config)[1])
    return "dit", arguments, original_dit.dit_rules(arguments)


def of_classifier(config):
    arguments = original_unet.classifier_arguments(originals.original_config(config)[1])
    return "noisy_classifier", arguments, original_unet.classifier_rules(arguments)


def of_tower(config):
    if "n_embed" in config:
        arguments = original_bert.bert_arguments(config)
        return "bert_text", arguments, original_bert.bert_rules(arguments)
    arguments = original_clip.open_arguments(config)
    return "clip_text", arguments, original_clip.open_rules(arguments)


@pytest.mark.parametrize("parts, config, parameters", [
    (of_adm, "adm_256", 553_838_086), (of_adm, "adm_512", 558_997_638), (of_ldm, "sd1", 859_520_964),
    (of_ldm, "sdxl", 2_567_463_684), (of_ldm, "ldm_cin256_v2", 400_920_579),
    (of_coder, "sd1", 83_653_863), (of_coder, "ldm_cin256", 67_717_295), (of_dit, "dit_xl_2_256", 674_834_720),
    (of_classifier, "adm_classifier_512", 54_448_360), (of_tower, {"layer": "last"}, 352_984_064),
    (of_tower, {"n_embed": 1280, "n_layer": 32}, 542_895_360),
])
def test_full_size(parts, config, parameters):
    """The published numbers of parameters: 554, 559, 860, 401, 84, 675, 54 million; the tower is 354 without its projection."""
    shapes = names(*parts(config))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


@pytest.mark.parametrize("row", originals.ORIGINALS)
def test_every_row_says_a_net_and_a_sampler(row):
    family, config = originals.original_config(row)
    assert family in FAMILIES and originals.original_config({"layout": row}) == (family, dict(config))
    if family == "ldm":
        of_ldm(row), of_coder(row)
        said = originals.ldm_options(config)
        found = schedulers.sampling(originals.ldm_scheduler(said))
        np.testing.assert_allclose(found.abar[:2], [1 - said["linear_start"], (1 - said["linear_start"]) * (1 - np.linspace(
            said["linear_start"]**0.5, said["linear_end"]**0.5, 1000)[1] ** 2)], rtol=1e-12)
    elif family == "dit":
        of_dit(row)
    else:
        (of_adm if family == "adm" else of_classifier)({key: value for key, value in config.items() if key != "noise_schedule"} |
                                                        {"layout": family})
        found, steps, unit = originals.respaced({key: value for key, value in config.items() if key in originals.DIFFUSION})
        assert schedulers.sampling(found).steps * unit == (1000 if unit != 1 or steps != 4000 else 4000) or unit == 1


def test_the_noise_of_other_numbers_of_steps():
    """Nichol & Dhariwal's linear schedule keeps its area: T betas from 0.1 / T to 20 / T."""
    config, steps, unit = originals.respaced({"diffusion_steps": 2000, "timestep_respacing": "ddim25", "rescale_timesteps": True})
    assert (steps, unit, config["timestep_spacing"]) == (25, 0.5, "leading")
    assert (config["beta_start"], config["beta_end"]) == (0.1 / 2000, 20 / 2000)


def zeros(shapes, prefix=""):
    return {prefix + name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def adm_file(folder, **changes):
    arrays = zeros(names(*of_adm(PLAIN)))
    arrays.update(changes)
    write_safetensors(str(folder / "model.safetensors"), {name: a for name, a in arrays.items() if a is not None})
    return str(folder / "model.safetensors")


def ldm_file(folder, **changes):
    arrays = zeros(names(*of_ldm(LATENT)), "model.diffusion_model.") | zeros(names(*of_coder(LATENT)), "first_stage_model.")
    arrays.update(changes)
    write_safetensors(str(folder / "model.safetensors"), {name: a for name, a in arrays.items() if a is not None})
    return str(folder / "model.safetensors")


def test_a_file_that_fits(tmp_path):
    assert load_original(adm_file(tmp_path), PLAIN, steps=7, guidance=1.0).defaults["steps"] == 7
    ours = load_original(ldm_file(tmp_path, **{"first_stage_model.loss.logvar": np.zeros(())}), LATENT)
    assert ours.system.image_shape == ours.system.sample_shape == (8, 8, 3) and set(ours.nets) == {"net", "autoencoder", "latent"}
    assert ours.defaults["ddim"] == {"eta": 1.0} and ours.defaults["steps"] == 200


@pytest.mark.parametrize("changes, words", [
    ({"out.2.bias": None}, "1 .out.2.bias. missing"), ({"out.3.bias": np.zeros(6)}, "1 .out.3.bias. left over"),
    ({"out.2.bias": np.zeros(3)}, r"1 .out.2.bias .3,. instead of .6,.. of another shape"),
    ({"middle_block.1.qkv.weight": np.zeros((96, 32))}, "middle_block.1.qkv.weight"),
    ({"middle_block.1.qkv.weight": np.zeros((95, 32, 1))}, r"middle_block.1.qkv.weight .95, 32, 1. instead of .96, 32, 1."),
    ({"out.2.bias": np.zeros(6, np.int32)}, "not of floating-point numbers"),
    ({"label_emb.weight": np.zeros((1000, 128))}, "label_emb.weight. left over"),
])
def test_a_file_that_does_not_fit(changes, words, tmp_path):
    """Missing, left over or of another shape; [out, in] in the place of [out, in, 1] alone is the same matrix."""
    path = adm_file(tmp_path, **{name: a if a is None else np.asarray(a, np.float32 if a.dtype == np.float64 else a.dtype)
                                 for name, a in changes.items()})
    if words == "middle_block.1.qkv.weight":
        load_original(path, PLAIN)
        return
    with pytest.raises(UserError, match=words):
        load_original(path, PLAIN)


@pytest.mark.parametrize("config, words", [
    ("adm_1024", "unknown original layout 'adm_1024'; there are adm_128, adm_"), (7, "config=7"),
    ({"image_size": 8}, "unknown original layout None"),
    (dict(PLAIN, use_magic=True), "use_magic=True"), (dict(PLAIN, noise_schedule="sqrt"), r"noise_schedule='sqrt' \(supported"),
    (dict(PLAIN, channel_mult=""), "image size 8 without channel_mult"), (dict(PLAIN, num_channels=48), "48 channels, no multiple of 32"),
    (dict(PLAIN, num_head_channels=20), "num_head_channels=20 for 32 channels"),
    (dict(PLAIN, timestep_respacing="10,20"), "timestep_respacing='10,20'"),
    (dict(PLAIN, timestep_respacing="2000"), "timestep_respacing='2000' of 1000"),
    (dict(PLAIN, large_size=64), "large_size=64, small_size=None"),
    (dict(LATENT, unet_config=dict(params=dict(n_embed=3))), "n_embed=3"), (dict(LATENT, given_betas=[1]), "given_betas"),
    (dict(LATENT, unet_config=dict(target="a.b.Other")), "unet_config.target='Other'"),
    (dict(LATENT, first_stage_config=dict(target="IdentityFirstStage")), "first_stage_config.target='IdentityFirstStage'"),
    (dict(LATENT, unet_config=dict(params=dict(context_dim=4))), "use_spatial_transformer=False with context_dim=4"),
    (dict(LATENT, unet_config=dict(params=dict(in_channels=5))), "in_channels=5 with channels=3, conditioning_key=None"),
    (dict(LATENT, beta_schedule="sqrt"), "beta_schedule='sqrt'"), (dict(LATENT, sampling=dict(sampler="dpm")), "sampler='dpm'"),
    (dict(LATENT, cond_stage_config=dict(target="x.Rescaler")), "unknown target of a cond_stage_config 'Rescaler'"),
    (dict(LATENT, first_stage_config=dict(params=dict(ddconfig=dict(attn_type="linear")))), "attn_type='linear'"),
    (dict(LATENT, sampling=dict(sampler="plms", eta=0.5)), "eta=0.5"),
    (dict(LATENT, cond_stage_config=dict(target="x.ClassEmbedder"),
          unet_config=dict(params=dict(use_spatial_transformer=True, context_dim=4))),
     "context_dim=4, conditioning_key='concat' with cond_stage_config"),
    (dict(LATENT, scale_by_std=True), "has no scale_factor"), ({"model": {"target": "x.Other", "params": {}}}, "target of a yaml 'Other'"),
    (dict(DIT, class_dropout_prob=0.0), "class_dropout_prob=0.0"), ("none.yaml", "cannot read none.yaml"),
])
def test_refused_configs(config, words, tmp_path):
    latent = isinstance(config, dict) and config.get("layout") == LATENT["layout"]
    path = ldm_file(tmp_path) if latent else adm_file(tmp_path)
    with pytest.raises(UserError, match=words):
        load_original(path, config, **({"vae": "none"} if "dit" in str(config) else {}))


@pytest.mark.parametrize("changes, options, words", [
    ({"extra": np.zeros(3, np.float32)}, {}, "1 arrays that its config does not know: extra"),
    ({"cond_stage_model.x": np.zeros(3, np.float32)}, {}, r"has 1 arrays cond_stage_model.\*, and its config is unconditional"),
    ({"alphas_cumprod": np.linspace(1, 0, 1000, dtype=np.float32)}, {}, "another alphas_cumprod than its config's"),
    ({"alphas_cumprod": np.ones(50, np.float32)}, {}, "another alphas_cumprod"), ({}, dict(ema=True), "no averaged weights"),
    ({"scale_factor": np.ones((), np.float32)}, {}, "does not know: scale_factor"),
    ({"first_stage_model.quant_conv.bias": None}, {},
     r"the arrays first_stage_model.\* in .* do not fit their config: 1 .quant_conv.bias. missing"),
    ({"model_ema.diffusion_modelout0weight": np.zeros(32, np.float32)}, {}, r"the arrays model.diffusion_model.\* in .* missing"),
    ({}, dict(tokenizer="words"), "takes no tokenizer"), ({}, dict(step=3), "unknown override 'step'; choose from: batch_size, dtype"),
    ({}, dict(param_dtype="int8"), "unknown param_dtype 'int8'"), ({}, dict(vae="nowhere"), "nowhere"),
])
def test_refused_files_of_latent_diffusion(changes, options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_original(ldm_file(tmp_path, **changes), LATENT, **options)


def test_refused_files_of_dit(tmp_path):
    arrays, path = zeros(names(*of_dit(DIT))), str(tmp_path / "model.safetensors")
    for positions, options, words in ((None, {"vae": "none"}, "has no pos_embed"),
                                      (np.zeros((1, 4, 8), np.float32), {"vae": "none"}, "pos_embed"),
                                      (sincos_positions(2, 2, 8)[None], {}, "give the directory of one, such as"),
                                      (sincos_positions(2, 2, 8)[None], {"vae": "none"}, "'none' is no component"),
                                      (sincos_positions(2, 2, 8)[None], {"vae": "none", "ema": False}, "averaged weights alone")):
        write_safetensors(path, arrays | ({} if positions is None else {"pos_embed": positions}))
        with pytest.raises(UserError, match=words):
            load_original(path, DIT, **options)


def test_a_whole_yaml(tmp_path):
    """As its path, with the parts of it that training alone needs."""
    params = {key: value for key, value in originals.original_config(LATENT)[1].items() if key != "sampling"}
    text = {"model": {"base_learning_rate": 2e-6, "target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        **params, "monitor": "val/loss", "scheduler_config": {"target": "a.b"}}}, "data": {"target": "c"}}
    (tmp_path / "config.yaml").write_text(json.dumps(text))  # which is YAML too
    ours = load_original(ldm_file(tmp_path), str(tmp_path / "config.yaml"))
    assert ours.system.sample_shape == (8, 8, 3) and ours.defaults["steps"] == 50
