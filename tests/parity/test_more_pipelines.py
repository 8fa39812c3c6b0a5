"""More pipelines that diffusers saves with random weights, read by `ldm_jax.load`: upscalers, score models, LDM's text-to-image."""
import dataclasses
import json
import random
import re
import unicodedata

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.data.text import load_tokenizer
from ldm_jax.published import load_net
from ldm_jax.types import UserError, example_keys, fold_in, normal
from tests.parity.peers import (
    CODER, CROSS, NEGATIVE, PLAIN, PROMPTS, SCALED, STEPS, close, nchw, noise, randomise, saved, started_from, tokenizer, tower)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SMALL = np.random.default_rng(1).random((2, 4, 4, 3)).astype(np.float32)
FOUR = dict(block_out_channels=(8, 8, 12), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4, sample_size=16)  # a first stage of factor 4
SKIPS = dict(down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
             block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=None, time_embedding_type="fourier", sample_size=4,
             mid_block_scale_factor=1.41421356, norm_eps=1e-6, attention_head_dim=None, freq_shift=0)
CONDITION = 2**31 - 1  # folded into a picture's key for the noise of its conditions


CORPUS = ("The quick brown fox jumps over the lazy dog; a photograph of an astronaut riding a horse in the style of Monet, don't you'll "
          "they've it's I'm 1234567890 Straße café naïve Привет мир 東京タワー 你好世界 مرحبا unaffable embeddings a cat at dawn an ox big ugly")
HARD = [
    "", " ", "\t\n\r\x0b\x0c", "a photo of a cat", "A Photo OF a CAT!!!", "unaffableness embeddingly", "don't DON'T we'll'll 'sup ''s o'clock's",
    "café cafe\u0301 Ünïcödé Straße ẞ ǅ İstanbul ΑΣ ΣΑΣ ς ﬁ Ａｂ１ Å ŉ ΐ", "東京タワー 日本語 你好，世界。한국어 ภาษาไทย हिन्दी مرحبا שלום",
    "a你b好c", "豈更車 𠀀𪜀𫝀 \U0002b820\U0002b920 ㍿ 〇々 ㄅ ア", "👩\u200d👩\u200d👧\u200d👦 🙂🙃🏳️\u200d🌈 ☃️ \U0001f1e9\U0001f1ea cat🙂cat",
    "1234 12.5 ½ ² ٣ Ⅷ 一二三 1st 3D x2 1,000 $5 €5 5% a+b=c ^~`|<>",
    "a\x00b\x01c\x1cd\x1de\x1ff\x7fg\x85h\u200bi\ufeffj\u2028k\u00a0l\u3000m\u180en\u00ado\ufffdp\ue000q\U0010ffffr\u0378s",
    "[UNK] [MASK]cat [CLS][SEP] [PAD] [mask] [ MASK ] [[MASK]] ##cat # #a", "x" * 100, "x" * 101, "the" * 40, "é" * 60, "fox " * 100,
    "cat," * 60, "\u0301\u0301 a\u0323\u0307 \uac00\u1100\u1161\u11a8 \u212b", "foo_bar __init__ http://example.com/a?b=c&d=e#f user@example.com",
    "…—–“”‘’ «» ¿¡ ‹› „ ‽ ⸮ 、。「」", "İ ı ſ K Å Ω ﬀ ŉ ǰ ΐ և ẖ ﬓ"]
PIECES = [*"aábcdefgAÉZ  \t\n'’!?,.-_<>|019½²東京アいΣσς🙂\u200d\u0301\u0308İßﬁ\u00a0\u3000\x85\x00\x1c#[]", "the", "ing ", "[MASK]", " [UNK] ", "##a"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def words_of_bert(folder, **config):
    """A vocabulary of word pieces trained on CORPUS, a line each, and what is said of it."""
    text = "".join(c for c in unicodedata.normalize("NFD", CORPUS.lower()) if unicodedata.category(c) != "Mn") + " " + CORPUS
    model = tokenizers.BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    model.train_from_iterator([text] * 3, vocab_size=600, min_frequency=1, show_progress=False)
    letters = "".join([*PIECES, *HARD[:11]]).translate(dict.fromkeys(map(ord, "qQ🙂?…一")))  # which stay unknown
    letters = {c for form in ("NFC", "NFD") for c in unicodedata.normalize(form, letters + letters.lower()) if not c.isspace()}
    vocab = sorted({*model.get_vocab(), *letters, *("##" + c for c in letters)}, key=lambda token: (token not in SPECIALS, token))
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
    return transformers.BertTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("config", [
    {}, {"do_lower_case": False}, {"strip_accents": False, "tokenize_chinese_chars": False}, {"do_lower_case": False, "strip_accents": True},
    {"model_max_length": 512, "pad_token": "!", "added_tokens_decoder": {0: {"content": "[CLS]", "lstrip": True, "special": True}}}], ids=str)
def test_bert_tokenizer(config, tmp_path):
    want, rng = words_of_bert(tmp_path / "words", **config), random.Random(1)
    want.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "tokenizer.json").exists() and not (tmp_path / "one" / "vocab.txt").exists()
    texts = HARD + ["".join(rng.choices(PIECES, k=rng.randrange(60))) for _ in range(300)]
    for folder in ("words", "one"):
        words = load_tokenizer(str(tmp_path / folder))
        assert words.max_length == config.get("model_max_length", 77)
        for text in texts:
            assert words.encode(text) == want(text, add_special_tokens=False)["input_ids"], repr(text)
        got = dataclasses.replace(words, max_length=77)(texts)
        theirs = want(texts, padding="max_length", max_length=77, truncation=True, return_tensors="np")
        np.testing.assert_array_equal(got.ids, theirs["input_ids"])
        np.testing.assert_array_equal(got.mask, theirs["attention_mask"])
        for text, cut in zip(texts, got.cut):
            left = want.convert_ids_to_tokens(want(text, add_special_tokens=False)["input_ids"][75:])
            assert cut == re.sub("^##", "", " ".join(left).replace(" ##", ""))
    assert sum(map(bool, got.cut)) > 2 and 0.01 < np.mean(got.ids[got.mask] == want.unk_token_id) < 0.5


def upscaler(folder, **options):
    words = tokenizer(folder / "words", "<|endoftext|>")
    coder = randomise(diffusers.AutoencoderKL(**FOUR, latent_channels=4, scaling_factor=0.08333), seed=1)
    coder.decoder.conv_in.weight.data *= 0.08333  # what it decodes is latents / 0.08333
    unet = randomise(diffusers.UNet2DConditionModel(**dict(CROSS, in_channels=7, num_class_embeds=60, only_cross_attention=[True, False],
                                                           use_linear_projection=True)))
    return saved(diffusers.StableDiffusionUpscalePipeline(
        coder, tower(words), words, unet, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DDIMScheduler(**SCALED, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False), **options),
        folder / "up")


@pytest.mark.parametrize("level", [None, 50])
def test_stable_diffusion_upscale(level, tmp_path, monkeypatch):
    """The noise of the small picture is that of the conditions here."""
    pipeline = upscaler(tmp_path, max_noise_level=50)
    ours, x = ldm_jax.load(str(tmp_path / "up"), batch_size=2), noise((4, 4, 4))
    assert ours.defaults["steps"] == 75 and ours.defaults["guidance"] == 9.0
    keys = fold_in(fold_in(fold_in(example_keys(jax.random.key(0), 2), 1), CONDITION), 0)
    started_from(pipeline, monkeypatch, np.asarray(normal(keys, SMALL.shape)))
    want = pipeline(PROMPTS, nchw(SMALL), negative_prompt=NEGATIVE, guidance_scale=4.0, num_inference_steps=STEPS, latents=nchw(x),
                    output_type="np", **({} if level is None else {"noise_level": level})).images
    image = SMALL if level is None else {"image": SMALL, "level": level}
    close(ours.sample(0, cond={"prompt": PROMPTS, "negative": NEGATIVE}, image=image, steps=STEPS, guidance=4.0, x_init=x), want)


def test_what_an_upscaler_refuses(tmp_path):
    pipeline, path = upscaler(tmp_path, max_noise_level=59), tmp_path / "up" / "model_index.json"
    with pytest.raises(UserError, match="level=60 .* from 0 to 59"):
        ldm_jax.load(str(tmp_path / "up")).sample(0, cond=PROMPTS, image={"image": SMALL, "level": 60}, steps=1)
    index = json.loads(path.read_text())
    for change, message in [({"max_noise_level": 60}, "knows 60 levels of noise .* max_noise_level=60"),
                            ({"low_res_scheduler": ["diffusers", "EulerDiscreteScheduler"]}, "'EulerDiscreteScheduler'")]:
        path.write_text(json.dumps({**index, **change}))
        with pytest.raises(UserError, match=message):
            ldm_jax.load(str(tmp_path / "up"))
    path.write_text(json.dumps(index))
    pipeline.vae.register_to_config(scaling_factor=0.5)
    pipeline.vae.save_pretrained(tmp_path / "up" / "vae")
    with pytest.warns(UserWarning, match="scaling_factor=0.5; an upscaler's latents have 0.08333"):
        ours = ldm_jax.load(str(tmp_path / "up"))
    np.testing.assert_allclose(ours.params["latent"]["scale"], 1 / 0.08333, rtol=1e-6)


def test_ldm_super_resolution(tmp_path, monkeypatch):
    """Of pictures of another size than the net's own."""
    coder = randomise(diffusers.VQModel(**FOUR, latent_channels=3, num_vq_embeddings=40), seed=1)
    unet = randomise(diffusers.UNet2DModel(**dict(PLAIN, in_channels=6, out_channels=3)))
    pipeline = saved(diffusers.LDMSuperResolutionPipeline(coder, unet, diffusers.DDIMScheduler(**SCALED, clip_sample=False)), tmp_path)
    ours, x = ldm_jax.load(str(tmp_path), size=(16, 24), batch_size=2), noise((4, 6, 3))
    image = np.random.default_rng(1).random((2, 4, 6, 3)).astype(np.float32)
    started_from(pipeline, monkeypatch, x)
    close(ours.sample(0, image=image, steps=STEPS, x_init=x),
          pipeline(nchw(image) * 2 - 1, num_inference_steps=STEPS, output_type="np").images)
    with pytest.raises(UserError, match="needs the condition 'low_resolution'"):
        ours.sample(0)


def draws_of_a_corrector(key, i, steps, repeats, shape):
    """What our picture i is noised with, in the peer's order: `repeats` draws of the corrector, then one of the predictor."""
    own = fold_in(example_keys(key, i + 1)[i:], 1)
    for step in range(steps):
        at = fold_in(own, step)
        yield from (np.asarray(normal(fold_in(fold_in(at, 1), j), (1, *shape))) for j in range(repeats))
        yield np.asarray(normal(fold_in(at, 0), (1, *shape)))


def test_score_sde_ve(tmp_path, monkeypatch):
    """The peer's correction depends on its batch, so it makes one picture at a time; both see the same noise throughout."""
    unet = randomise(diffusers.UNet2DModel(**SKIPS))
    rule = diffusers.ScoreSdeVeScheduler(num_train_timesteps=40, snr=0.2, sigma_min=0.02, sigma_max=0.4, sampling_eps=0.02,
                                         correct_steps=2)
    pipeline = saved(diffusers.ScoreSdeVePipeline(unet, rule), tmp_path)
    ours, x = ldm_jax.load(str(tmp_path), batch_size=2), noise((4, 4, 3)) + 1.0  # half of the peer's pixels would be cut off at 0 otherwise
    assert ours.defaults["steps"] == 40
    got, want = ours.sample(0, steps=STEPS, x_init=x), []
    for i in range(2):
        started_from(pipeline, monkeypatch, x[i:i + 1], *draws_of_a_corrector(jax.random.key(0), i, STEPS, 2, x.shape[1:]))
        want.append(pipeline(1, num_inference_steps=STEPS, output_type="np").images)
    close(got, np.concatenate(want))


def bert(words, **options):
    """The peer's text tower; no parameter is zero, nor is a score so large that one token is all that another sees."""
    ldm = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
    return randomise(ldm.LDMBertModel(ldm.LDMBertConfig(**{**dict(
        vocab_size=len(words), encoder_layers=2, encoder_ffn_dim=20, encoder_attention_heads=3, head_dim=5, d_model=12), **options})))


@pytest.mark.parametrize("options", [{}, dict(activation_function="gelu_new", encoder_attention_heads=1, head_dim=12, encoder_layers=3)])
def test_bert_tower(options, tmp_path):
    model = bert(range(50), **options)
    model.save_pretrained(tmp_path)
    net, params = load_net(str(tmp_path))
    ids = np.random.default_rng(0).integers(0, 50, (3, 77))
    with torch.no_grad():
        want = model(torch.tensor(ids), output_hidden_states=True, return_dict=True)
    got = jax.jit(lambda p, i: net.apply(p, i, hidden=True))(params, ids.astype(np.int32))
    assert got.pooled is None and got.projected is None
    np.testing.assert_allclose(got.last, want.last_hidden_state, atol=1e-4)
    np.testing.assert_allclose(got.hidden[:-1], np.stack([h.numpy() for h in want.hidden_states[:-1]]), atol=1e-4)


@pytest.mark.parametrize("coder", ["AutoencoderKL", "VQModel"])
def test_ldm_text_to_image(coder, tmp_path):
    words = words_of_bert(tmp_path / "words", model_max_length=512)
    options = dict(latent_channels=4, scaling_factor=0.4, **({"num_vq_embeddings": 40} if coder == "VQModel" else {}))
    first = randomise(getattr(diffusers, coder)(**CODER, **options), seed=1)
    unet = randomise(diffusers.UNet2DConditionModel(**CROSS))
    rule = diffusers.DDIMScheduler(**SCALED, clip_sample=False)
    pipeline = saved(diffusers.LDMTextToImagePipeline(first, bert(words), words, unet, rule), tmp_path / "ldm")
    ours, x = ldm_jax.load(str(tmp_path / "ldm"), batch_size=2), noise((4, 4, 4))
    assert ours.defaults["guidance"] == 1.0 and sorted(ours.nets) == ["autoencoder", "bert", "latent", "net"]
    for guidance in (1.0, 4.0)[coder == "AutoencoderKL":]:
        want = pipeline(PROMPTS, height=32, width=32, guidance_scale=guidance, num_inference_steps=STEPS, latents=nchw(x),
                        output_type="np").images
        close(ours.sample(0, cond=PROMPTS, steps=STEPS, guidance=guidance, x_init=x), want)
    with pytest.warns(UserWarning, match="does not see 'fox fox fox'"):
        ours.sample(0, cond="fox " * 78, steps=1)
