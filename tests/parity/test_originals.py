"""Files in their authors' own layouts, read by `load_original`: the outputs of diffusers' conversions, and of references written out."""
import argparse
import sys

import jax
import numpy as np
import pytest

from ldm_jax.pipelines.originals import load_original
from ldm_jax.types import UserError, example_keys, fold_in, normal
from ldm_jax.weights import original_dit, original_unet, originals
from tests.parity import originals as peer
from tests.parity.peers import CODER, NEGATIVE, PROMPTS, STEPS, bert, bert_tokenizer, close, nchw, noise, randomise, tokenizer
from tests.weights.named import names

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
convert = pytest.importorskip("diffusers.loaders.single_file_utils")

KS = np.array([3, 700])
UNET = dict(model_channels=32, channel_mult=(1, 2), attention_resolutions=(1,), num_res_blocks=1, context_dim=64)
DD = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=32)
CODES = dict(embed_dim=3, n_embed=40, ddconfig=dict(DD, z_channels=3))
TOWER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
OPEN = dict(width=64, heads=4, layers=3, embed_dim=64)
ADM = dict(image_size=32, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="16,8")


def equal(got, want):
    """To 1e-4 of the largest value."""
    want = want.detach().numpy()
    want = want.transpose(0, 2, 3, 1) if want.ndim == 4 else want
    assert got.shape == want.shape and 0.1 < np.abs(want).max() < 100
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), rtol=0)


def raw(pipeline, x, cond=None):
    net, params = pipeline.nets["net"]
    return np.asarray(jax.jit(net.apply)(params, x, (KS + 1) / net.timesteps, cond))


def stable_diffusion(row, words, **changes):
    text = {"text_cfg": dict(OPEN, vocab_size=len(words))} if row.startswith("sd2") else {"text_config": dict(TOWER, vocab_size=len(words))}
    heads = {"num_head_channels": 16} if row.startswith("sd2") else {"num_heads": 2}
    return dict(layout=row, image_size=16, unet_config=dict(params=dict(UNET, **heads)), first_stage_config=dict(params=dict(ddconfig=DD)),
                cond_stage_config=dict(params=text), **changes)


def whole_yaml(config):
    """A yaml with the values of a config of `ldm`."""
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        key: value for key, value in originals.original_config(config)[1].items() if key != "sampling"}}}


def converted(config, state, **changes):
    """(U-Net, first stage) of diffusers, by its own conversion."""
    config = whole_yaml(config)
    of_unet = {**convert.create_unet_diffusers_config_from_ldm(config, state), "sample_size": 16, **changes}
    unet = diffusers.UNet2DConditionModel(**{key: value for key, value in of_unet.items() if value is not None})
    unet.load_state_dict(convert.convert_ldm_unet_checkpoint(dict(state), of_unet))
    of_coder = {**convert.create_vae_diffusers_config_from_ldm(config, state), "sample_size": 32}
    vq = config["model"]["params"]["first_stage_config"]["params"].get("n_embed")
    coder = diffusers.VQModel(**of_coder, num_vq_embeddings=vq) if vq else diffusers.AutoencoderKL(**of_coder)
    found = convert.convert_ldm_vae_checkpoint(dict(state), of_coder)
    found |= {name: state[f"first_stage_model.{name}"] for name in ["quantize.embedding.weight"] if vq}  # which it leaves out
    coder.load_state_dict(found)
    return unet.eval(), coder.eval()


def tower(row, state, words):
    """The text tower of diffusers, by its own conversion; of OpenCLIP's without the last block."""
    ids = dict(vocab_size=len(words), eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id)
    if row.startswith("sd2"):
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**ids, **dict(TOWER, intermediate_size=256), hidden_act="gelu"))
        kept = {name: a for name, a in state.items() if "resblocks.2." not in name and "projection" not in name}
        found = convert.convert_open_clip_checkpoint(model, kept)
    else:
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**ids, **TOWER))
        found = convert.convert_ldm_clip_checkpoint(state)
    bare = not any(name.startswith("text_model.") for name in model.state_dict())
    model.load_state_dict({name.removeprefix("text_model.") if bare else name: a for name, a in found.items()})
    return model.eval()


@pytest.mark.parametrize("row", ["sd1", pytest.param("sd2_v", marks=pytest.mark.long)])
def test_stable_diffusion(row, tmp_path):
    """From a checkpoint of the trainer's: the nets, and a picture by the sampler of the original program."""
    words = tokenizer(tmp_path / "words", "!" if row.startswith("sd2") else "<|endoftext|>")
    config = stable_diffusion(row, words)
    state = peer.of_ldm(config)
    buffers = {"alphas_cumprod": peer.alphas(0.00085, 0.012), "betas": torch.ones(1000), "model_ema.decay": torch.tensor(0.9)}
    torch.save({"state_dict": {**state, **buffers}, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}], "global_step": 7},
               tmp_path / "model.ckpt")
    (tmp_path / "words" / "tokenizer_config.json").unlink()  # the bare vocabulary, as CLIP's authors have it
    ours = load_original(tmp_path / "model.ckpt", config, tokenizer=str(tmp_path / "words"), batch_size=2)
    unet, coder = converted(config, state)
    text = tower(row, state, words)

    x = noise((16, 16, 4))
    context = np.random.default_rng(1).standard_normal((2, 7, 64)).astype(np.float32)
    equal(raw(ours, x, {"context": context}), unet(nchw(x), torch.tensor(KS), torch.tensor(context)).sample)
    net, params = ours.nets["autoencoder"]
    assert net.scale == 0.18215
    pictures = noise((32, 32, 3))
    equal(np.asarray(jax.jit(net.encode)(params, pictures)[0]), coder.encode(nchw(pictures)).latent_dist.mean)

    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False)
    if row == "sd1":
        scheduler = diffusers.PNDMScheduler(**schedule, skip_prk_steps=True)
    else:
        scheduler = diffusers.DDIMScheduler(**schedule, clip_sample=False, prediction_type="v_prediction")
    pipeline = diffusers.StableDiffusionPipeline(coder, text, words, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(PROMPTS, negative_prompt=NEGATIVE, guidance_scale=4.0, height=32, width=32, num_inference_steps=STEPS, latents=nchw(x),
                    output_type="np").images
    close(ours.sample(0, cond={"prompt": PROMPTS, "negative": NEGATIVE}, steps=STEPS, guidance=4.0, x_init=x), want)
    assert ours.defaults["guidance"] == (7.5 if row == "sd1" else 9.0) and ours.defaults["steps"] == 50
    if row == "sd1":  # the file as a directory: diffusers makes the same picture of it
        ours.save_pretrained(tmp_path / "out")
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
        again.set_progress_bar_config(disable=True)
        close(again(PROMPTS, negative_prompt=NEGATIVE, guidance_scale=4.0, height=32, width=32, num_inference_steps=STEPS, latents=nchw(x),
                    output_type="np").images, want)


@pytest.mark.long
def test_stable_diffusion_xl(tmp_path):
    """Two towers, both before their last blocks, and the numbers of the picture's size."""
    words, others = tokenizer(tmp_path / "words", "<|endoftext|>"), tokenizer(tmp_path / "others", "!")
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=len(words), eos_token_id=words.eos_token_id,
                 bos_token_id=words.bos_token_id)
    unet = dict(UNET, attention_resolutions=(2,), transformer_depth=(1, 2), num_head_channels=16, context_dim=128,
                adm_in_channels=48 + 6 * 256)
    config = dict(layout="sdxl", image_size=16, unet_config=dict(params=unet), first_stage_config=dict(params=dict(ddconfig=DD)),
                  cond_stage_config=dict(params=dict(text_config=dict(TOWER, num_hidden_layers=3, vocab_size=len(words)),
                                                     text_cfg=dict(OPEN, embed_dim=48, vocab_size=len(words)))))
    state = peer.of_ldm(config)
    torch.save(state, tmp_path / "model.ckpt")
    ours = load_original(tmp_path / "model.ckpt", config, tokenizer=str(tmp_path / "words"), batch_size=2)
    unet, coder = converted(config, state, class_embed_type=None, addition_embed_type="text_time", addition_time_embed_dim=256,
                            attention_head_dim=[2, 4])
    first = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, intermediate_size=96))
    second = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes, intermediate_size=256, hidden_act="gelu",
                                                                                  projection_dim=48))
    found = convert.convert_ldm_clip_checkpoint(state, "conditioner.embedders.0.transformer.")
    bare = not any(name.startswith("text_model.") for name in first.state_dict())
    first.load_state_dict({name.removeprefix("text_model.") if bare else name: a for name, a in found.items()})
    prefix = "conditioner.embedders.1.model."
    kept = {name: a for name, a in state.items() if name != f"{prefix}text_projection"}
    found = convert.convert_open_clip_checkpoint(second, kept, prefix)
    second.load_state_dict(found | {"text_projection.weight": state[f"{prefix}text_projection"].T})
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                                 timestep_spacing="leading")
    pipeline = diffusers.StableDiffusionXLPipeline(coder, first, second.eval(), words, others, unet, scheduler, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    x = noise((16, 16, 4))
    want = pipeline(PROMPTS, height=32, width=32, num_inference_steps=STEPS, latents=nchw(x), output_type="np").images
    close(ours.sample(0, cond=PROMPTS, steps=STEPS, x_init=x), want)


def test_inpainting(tmp_path):
    """The mask and the masked picture behind x_t."""
    words = tokenizer(tmp_path / "words", "<|endoftext|>")
    config = stable_diffusion("sd1_inpainting", words)
    state = peer.of_ldm(config)
    torch.save(state, tmp_path / "model.ckpt")
    ours = load_original(tmp_path / "model.ckpt", config, tokenizer=str(tmp_path / "words"))
    unet, _ = converted(config, state)
    x, context = noise((16, 16, 9)), np.ones((2, 7, 64), np.float32)
    equal(raw(ours, x, {"context": context}), unet(nchw(x), torch.tensor(KS), torch.tensor(context)).sample)
    assert set(ours.system.conditioners) == {"prompt", "masked_image"} and ours.defaults["name"] == "ddim"


def test_text_to_image(tmp_path):
    """The tower of the first latent text-to-image model, and its texts of 77 tokens."""
    words = bert_tokenizer(tmp_path / "words", "a cat, an ox")
    config = dict(layout="ldm_txt2img_1p4b", image_size=16, unet_config=dict(params=dict(UNET, num_heads=2, context_dim=24)),
                  first_stage_config=dict(params=dict(ddconfig=DD)),
                  cond_stage_config=dict(params=dict(n_embed=24, n_layer=2, vocab_size=len(words))))
    state = peer.of_ldm(config)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    (tmp_path / "words" / "tokenizer_config.json").unlink()
    ours = load_original(tmp_path / "model.ckpt", config, tokenizer=str(tmp_path / "words"))
    theirs = bert(len(words), encoder_ffn_dim=96, encoder_attention_heads=8, head_dim=64, d_model=24)
    prefix = "cond_stage_model.transformer."
    names_of = {"model.embed_tokens": "token_emb", "model.embed_positions": "pos_emb.emb", "model.layer_norm": "norm"}
    for i in range(2):
        block, attention, mlp = f"model.layers.{i}.", f"attn_layers.layers.{2 * i}.", f"attn_layers.layers.{2 * i + 1}."
        names_of |= {f"{block}self_attn.{x}_proj": f"{attention}1.to_{x}" for x in "qkv"} | {
            f"{block}self_attn.out_proj": f"{attention}1.to_out", f"{block}self_attn_layer_norm": f"{attention}0",
            f"{block}final_layer_norm": f"{mlp}0", f"{block}fc1": f"{mlp}1.net.0.0", f"{block}fc2": f"{mlp}1.net.2"}
    own = {name: name.rsplit(".", 1) for name in theirs.state_dict() if not name.startswith("to_logits")}
    theirs.load_state_dict({name: state[f"{prefix}{names_of[stem]}.{leaf}"] for name, (stem, leaf) in own.items()}, strict=False)
    text = words(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    read = ours.system.conditioners["prompt"].read(PROMPTS)["prompt"]["text_encoder"]
    np.testing.assert_array_equal(read, text)
    tower_of, params = ours.nets["text_encoder"]
    equal(np.asarray(tower_of.apply(params, read).last), theirs(text)[0])


@pytest.mark.parametrize("ema", [None, False])
def test_classes_as_tokens(ema, tmp_path):
    """The class-conditional models of Rombach et al., whose last class is no class; from the averaged weights or the last ones."""
    config = dict(layout="ldm_cin256_v2", image_size=16, use_ema=True, unet_config=dict(params=dict(UNET, num_heads=2)),
                  first_stage_config=dict(params=CODES), cond_stage_config=dict(params=dict(embed_dim=64, n_classes=11)))
    state = peer.of_ldm(config)
    prefix = "model.diffusion_model."
    unet = {name: a for name, a in state.items() if name.startswith(prefix)}
    other = peer.drawn({name: tuple(a.shape) for name, a in unet.items()}, seed=9)
    averages = {"model_ema." + "".join(name.split(".")[1:]): other[name] for name in unet}
    torch.save({**state, **averages, "model_ema.num_updates": torch.tensor(3)}, tmp_path / "model.ckpt")
    ours = load_original(tmp_path / "model.ckpt", config, ema=ema)
    peers, coder = converted(config, {**state, **(other if ema is None else {})})

    x, (table, rows) = noise((16, 16, 3)), ours.nets["class_table"]
    context = np.asarray(table.apply(rows, np.array([4, 10])))
    np.testing.assert_array_equal(context[:, 0], state["cond_stage_model.embedding.weight"][[4, 10]])
    equal(raw(ours, x, {"context": context}), peers(nchw(x), torch.tensor(KS), torch.tensor(context)).sample)
    if ema is False:
        return
    net, params = ours.nets["autoencoder"]
    equal(np.asarray(jax.jit(net.encode)(params, noise((32, 32, 3)))), coder.encode(nchw(noise((32, 32, 3)))).latents)
    equal(np.asarray(jax.jit(net.decode)(params, x)), coder.decode(nchw(x)).sample)
    conditioner = ours.system.conditioners["class"]
    np.testing.assert_array_equal(np.asarray(conditioner.null(2)["context"]), context[[1, 1]])
    with pytest.raises(UserError, match="class id 10 is out of range; this model knows 0 to 9"):
        ours.sample(0, cond=[10])


def test_unconditional_latents(tmp_path):
    """Plain attentions, resampling in blocks, and a scale of the latents that the file holds."""
    unet = dict(model_channels=32, channel_mult=(1, 2), attention_resolutions=(1, 2), num_res_blocks=1, num_heads=2)
    config = dict(layout="ldm_lsun_churches256", image_size=16, unet_config=dict(params=unet),
                  first_stage_config=dict(params=dict(ddconfig=DD)))
    state = peer.of_ldm(config)
    torch.save({"state_dict": {**state, "scale_factor": torch.tensor(0.3)}}, tmp_path / "model.ckpt")
    ours, x = load_original(tmp_path / "model.ckpt", config), noise((16, 16, 4))
    prefix = "model.diffusion_model."
    own = {name.removeprefix(prefix): a for name, a in state.items() if name.startswith(prefix)}
    equal(raw(ours, x), peer.adm(own, nchw(x), torch.tensor(KS), width=32, blocks=1, heads=lambda channels: 2, order="legacy",
                                 block_resampling=True))
    np.testing.assert_allclose(np.asarray(ours.params["latent"]["scale"]), np.full(4, 1 / 0.3), rtol=1e-6)
    assert ours.defaults["name"] == "ddim" and ours.defaults["steps"] == 400


def adm_file(folder, row, **changes):
    """(the tensors of a file model.pt, its config)."""
    config = {**ADM, "layout": row, "num_head_channels": 16, **changes}
    flags = originals.original_config(config)[1]
    arguments = original_unet.adm_arguments({key: value for key, value in flags.items() if key in original_unet.FLAGS})
    order = "new" if flags.get("use_new_attention_order") else "legacy"
    state = peer.drawn(names("unet_of_levels", arguments, original_unet.unet_rules(arguments, order)))
    torch.save(state, folder / "model.pt")
    return state, {key: value for key, value in config.items() if key != "image_size" or "large_size" not in config}


@pytest.mark.parametrize("changes", [
    dict(use_new_attention_order=True, num_head_channels=16),
    dict(num_heads=4, num_head_channels=-1, num_res_blocks=2),
    dict(num_heads=2, num_head_channels=-1, class_cond=False, learn_sigma=False, use_scale_shift_norm=False, resblock_updown=False),
    dict(num_channels=64, channel_mult=(0.5, 1), num_head_channels=32),
], ids=["new", "heads", "plain", "half"])
def test_adm(changes, tmp_path):
    state, config = adm_file(tmp_path, "adm_256", num_classes=7, **changes)
    flags = originals.original_config(config)[1]
    ours, x, y = load_original(tmp_path / "model.pt", config), noise((32, 32, 3)), np.array([2, 6])
    y = y if flags["class_cond"] else None
    heads = lambda channels: channels // flags["num_head_channels"] if flags["num_head_channels"] != -1 else flags["num_heads"]
    want = peer.adm(state, nchw(x), torch.tensor(KS), y, width=flags["num_channels"], blocks=flags["num_res_blocks"], heads=heads,
                    order="new" if "use_new_attention_order" in changes else "legacy", block_resampling=flags["resblock_updown"],
                    scale_shift=flags["use_scale_shift_norm"])
    equal(raw(ours, x, y), want)


SMALL = dict(width=32, blocks=1, heads=lambda channels: channels // 16, order="legacy")


def test_rescaled_times(tmp_path):
    """Of 4000 steps the net is told k / 4."""
    state, config = adm_file(tmp_path, "iddpm_imagenet64", channel_mult="1", attention_resolutions="")
    ours, x = load_original(tmp_path / "model.pt", config), noise((32, 32, 3))
    assert ours.nets["net"][0].timesteps == 4000
    equal(raw(ours, x), peer.adm(state, nchw(x), torch.tensor(KS) / 4.0, **SMALL))


def test_enlarging(tmp_path):
    """A net that enlarges pictures is given them behind x_t, bilinearly enlarged."""
    state, config = adm_file(tmp_path, "adm_upsampler_64_256", small_size=8, large_size=32, class_cond=False, channel_mult="1",
                             attention_resolutions="")
    ours, x = load_original(tmp_path / "model.pt", config), noise((32, 32, 3))
    small = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    keys, value = example_keys(jax.random.key(0), 2), {"image": small, "level": np.zeros(2)}
    given = ours.system.conditioners["low_resolution"].encode(ours.params, value, keys, None)
    enlarged = torch.nn.functional.interpolate(nchw(2 * small - 1), (32, 32), mode="bilinear")
    equal(np.asarray(given["concat"]), enlarged)
    want = peer.adm(state, torch.cat([nchw(x), enlarged], 1), torch.tensor(KS), block_resampling=True, **SMALL)
    equal(raw(ours, x, given), want)


def test_a_picture_of_adm(tmp_path, monkeypatch):
    """Ancestral sampling with the learned variance, in steps spaced as the original program does it, from the peer's noise."""
    state, config = adm_file(tmp_path, "adm_256_uncond", channel_mult="1", attention_resolutions="")
    ours, x = load_original(tmp_path / "model.pt", config), noise((32, 32, 3))
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace")
    want = ancestral(scheduler, lambda a, k: peer.adm(state, a, k, **SMALL), x, monkeypatch)
    close(ours.sample(0, steps=STEPS, x_init=x), want.numpy().transpose(0, 2, 3, 1).clip(-1, 1) / 2 + 0.5)
    assert ours.defaults["steps"] == 250


def ancestral(scheduler, predict, x, monkeypatch):
    """The peer's loop of sampling, on the noise of the pictures here."""
    keys, a = fold_in(example_keys(jax.random.key(0), 2), 1), nchw(x)
    left = iter([nchw(np.asarray(normal(fold_in(keys, i), x.shape))) for i in range(STEPS)])
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", lambda *args, **options: next(left))
    scheduler.set_timesteps(STEPS)
    for k in scheduler.timesteps:
        a = scheduler.step(predict(a, k.expand(2)), k, a).prev_sample
    return a


@pytest.mark.parametrize("pool", ["attention", "adaptive"])
def test_classifier(pool, tmp_path):
    """Its logits, and that it guides."""
    config = dict(layout="adm_classifier_128", image_size=32, classifier_width=64, classifier_depth=1, classifier_pool=pool,
                  channel_mult="0.5,1", num_head_channels=32, num_classes=7)
    arguments = original_unet.classifier_arguments({key: value for key, value in config.items() if key != "layout"})
    state = peer.drawn(names("noisy_classifier", arguments, original_unet.classifier_rules(arguments)))
    torch.save(state, tmp_path / "classifier.pt")
    judge, x = load_original(tmp_path / "classifier.pt", config), noise((32, 32, 3))
    want = peer.adm_classifier(state, nchw(x), torch.tensor(KS), pool=pool, head_width=32, width=64, blocks=1, block_resampling=True)
    equal(np.asarray(jax.jit(judge.system.classify)(judge.params, x, (KS + 1) / 1000)), want)
    if pool == "adaptive":
        _, net = adm_file(tmp_path, "adm_256_uncond", channel_mult="1", attention_resolutions="")
        ours = load_original(tmp_path / "model.pt", net)
        plain, guided = (ours.sample(0, num=1, steps=1, cond=[3], classifier=judge, classifier_scale=scale) for scale in (0.0, 5.0))
        assert np.abs(plain - guided).max() > 1e-3


@pytest.mark.parametrize("trained", [False, True])
def test_dit(trained, tmp_path, monkeypatch):
    """The net and a guided picture, from the published kind of file and from a checkpoint of training."""
    sizes = dict(input_size=8, hidden_size=24, depth=2, num_heads=3, patch_size=2)
    config = dict(sizes, layout="dit_xl_2_256", num_classes=9)
    arguments = original_dit.dit_arguments(dict(sizes, num_classes=9))
    shapes = names("dit", arguments, original_dit.dit_rules(arguments))
    state = {**peer.drawn(shapes), "pos_embed": peer.positions(4, 24)}
    whole = {"model": {**peer.drawn(shapes, seed=5), "pos_embed": state["pos_embed"]}, "ema": state,
             "opt": {"state": {0: {"step": torch.ones(2)}}}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(whole if trained else state, tmp_path / "model.pt")
    coder = randomise(diffusers.AutoencoderKL(**CODER, latent_channels=4, scaling_factor=0.4), seed=1)
    coder.save_pretrained(tmp_path / "vae")
    ours, x, y = load_original(tmp_path / "model.pt", config, vae=str(tmp_path / "vae")), noise((8, 8, 4)), np.array([2, 9])
    predict = lambda a, k, ids: peer.dit(state, a, k, torch.tensor(ids), depth=2, heads=3, patch=2)
    equal(raw(ours, x, y), predict(nchw(x), torch.tensor(KS), y))
    if trained:
        return

    def guided(a, k):
        given, null = predict(a, k, [2, 8]), predict(a, k, [9, 9])
        return torch.cat([null[:, :4] + 3.0 * (given[:, :4] - null[:, :4]), given[:, 4:]], 1)

    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    want = coder.decode(ancestral(scheduler, guided, x, monkeypatch) / 0.4).sample.detach().numpy().transpose(0, 2, 3, 1)
    close(ours.sample(0, cond=[2, 8], steps=STEPS, guidance=3.0, x_init=x), np.clip(want / 2 + 0.5, 0, 1))
    assert ours.defaults["steps"] == 250 and ours.defaults["guidance"] == 4.0
