"""CLIP's text tower and tokeniser against transformers: small random towers and a trained vocabulary, through their files."""
import json
import random

import jax
import numpy as np
import pytest

from ldm_jax.data.bytepairs import LETTERS
from ldm_jax.data.text import load_tokenizer
from ldm_jax.models.clip import TEXT_TOWERS, clip_text
from ldm_jax.published import load_net
from ldm_jax.weights.maps_clip import clip_text_arguments, clip_text_config, clip_text_rules, today
from ldm_jax.weights.rules import save
from ldm_jax.weights.stored import write_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors_torch = pytest.importorskip("safetensors.torch")

WORDS = dict(vocab_size=99, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, projection_dim=10,
             max_position_embeddings=13)
TOWERS = {
    "old": (transformers.CLIPTextModel, dict(eos_token_id=2)),
    "new": (transformers.CLIPTextModel, dict(eos_token_id=97, hidden_act="gelu", layer_norm_eps=1e-3)),
    "no end": (transformers.CLIPTextModel, dict(eos_token_id=49407, num_attention_heads=1)),
    "projected, old": (transformers.CLIPTextModelWithProjection, dict(eos_token_id=2, hidden_act="gelu", projection_dim=24)),
    "projected, new": (transformers.CLIPTextModelWithProjection, dict(eos_token_id=97, num_hidden_layers=1,
                                                                      intermediate_size=13)),
    "tanh": (transformers.CLIPTextModelWithProjection, dict(eos_token_id=97, hidden_act="gelu_pytorch_tanh")),
}


def peer(kind, options):
    """A tower with nothing left at zero or one."""
    torch.manual_seed(0)
    model = kind(transformers.CLIPTextConfig(**{**WORDS, **options})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(0.3 * torch.randn_like(p) + ("norm" in name and name.endswith("weight")))
            else:
                p.copy_(torch.randn_like(p) * (0.5 if "embedding" in name else p.shape[1] ** -0.5))
    return model


def texts(seed):
    ids = np.random.default_rng(seed).integers(3, 96, (3, 11))
    ids[:, 0] = 96
    for row, end in enumerate((5, 10, 2)):
        ids[row, end:] = 97
    ids[0, 8] = 98  # above the end: only the old rule pools there
    ids[2, 3:] = 0
    mask = np.ones_like(ids)
    mask[0, 6:] = mask[2, 3:] = 0
    return ids, mask


@pytest.mark.parametrize("name", TOWERS)
def test_tower(name, tmp_path):
    kind, options = TOWERS[name]
    model = peer(kind, options)
    model.save_pretrained(tmp_path)
    net, params = load_net(str(tmp_path))
    ids, mask = texts(0)
    for seen in (None, mask):
        with torch.no_grad():
            want = model(torch.tensor(ids), None if seen is None else torch.tensor(seen), output_hidden_states=True)
        got = jax.jit(lambda p, i, m: net.apply(p, i, m, hidden=True))(params, ids.astype(np.int32), seen)
        np.testing.assert_allclose(got.last, want.last_hidden_state, atol=1e-4)
        np.testing.assert_allclose(got.hidden, np.stack([h.numpy() for h in want.hidden_states]), atol=1e-4)
        if kind is transformers.CLIPTextModel:
            np.testing.assert_allclose(got.pooled, want.pooler_output, atol=1e-4)
            assert got.projected is None
        else:
            np.testing.assert_allclose(got.projected, want.text_embeds, atol=1e-4)
    with torch.no_grad():  # the penultimate layer with the last norm, as CLIP skip has it
        inner = model if kind is transformers.CLIPTextModel else model.text_model
        skipped = inner.final_layer_norm(want.hidden_states[-2])
    np.testing.assert_allclose(net.final_norm(params, got.hidden[-2]), skipped, atol=1e-4)


@pytest.mark.parametrize("name", ["old", "projected, old"])
def test_names_of_every_release(name, tmp_path):
    """With and without text_model., with the positions that old files hold, in float16: the same parameters; and out again."""
    kind, options = TOWERS[name]
    model = peer(kind, options).half()
    model.save_pretrained(tmp_path)
    _, want = load_net(str(tmp_path))
    state = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    full = {k if k == "text_projection.weight" else f"text_model.{k}": v for k, v in state.items()}
    full["text_model.embeddings.position_ids"] = torch.arange(WORDS["max_position_embeddings"])[None]
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, load_net(str(tmp_path / "sharded"))[1], want)
    for i, names in enumerate((state, full)):
        folder = tmp_path / str(i)
        folder.mkdir()
        safetensors_torch.save_file(names, folder / "model.safetensors")
        (folder / "config.json").write_text((tmp_path / "config.json").read_text())
        net, got = load_net(str(folder))
        jax.tree.map(np.testing.assert_array_equal, got, want)

    arrays = save(clip_text_rules(net.arguments), got)
    assert set(arrays) == set(full) - {"text_model.embeddings.position_ids"}
    out = tmp_path / "out"
    out.mkdir()
    write_safetensors(str(out / "model.safetensors"), arrays)
    (out / "config.json").write_text(json.dumps(clip_text_config(net.arguments)))
    again = kind.from_pretrained(out)
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key].float(), rtol=0, atol=0)
    for key in (*WORDS, "eos_token_id", "hidden_act", "layer_norm_eps"):
        assert getattr(again.config, key) == getattr(model.config, key) or key == "projection_dim" and not net.projection_dim, key


FULL = {  # the published configs
    "clip_vit_l": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, eos_token_id=2),
    "openclip_vit_h": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                           hidden_act="gelu", eos_token_id=2),
    "openclip_vit_bigg": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                              hidden_act="gelu", projection_dim=1280, eos_token_id=2),
}


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_full_size_by_name_and_shape(name):
    kind = transformers.CLIPTextModelWithProjection if "projection_dim" in FULL[name] else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(**FULL[name], architectures=[kind.__name__])
    with torch.device("meta"):
        state = {k: tuple(v.shape) for k, v in today(kind(config).state_dict()).items()}
    net = clip_text(**TEXT_TOWERS[name])
    arguments = clip_text_arguments(config.to_diff_dict())
    assert clip_text(**arguments) == net
    shapes = jax.tree.map(lambda a: np.broadcast_to(np.float32(0), a.shape), jax.eval_shape(net.init, jax.random.key(0)))
    arrays = save(clip_text_rules(net.arguments), shapes)
    assert {k: v.shape for k, v in arrays.items()} == state


CORPUS = ("The quick brown fox jumps over the lazy dog; a photograph of an astronaut riding a horse in the style of Monet, don't "
          "you'll they've it's I'm he'd we're 1234567890 Straße café naïve Привет мир 東京タワー 你好世界 مرحبا 🙂🙃🏳️ ") * 3
HARD = [
    "", " ", "\t\n\r\x0b\x0c", "a photo of a cat", "A Photo OF a CAT!!!",
    "don't DON'T we'll'll I'm'm you're 'sup ''s !'s o'clock's 'S",
    "café cafe\u0301 Ünïcödé Straße ẞ ǅ İstanbul ΑΣ ΣΑΣ ς ﬁ Ａｂ１ Å ŉ ΐ", "東京タワー 日本語 你好，世界。한국어 ภาษาไทย हिन्दी مرحبا שלום",
    "👩\u200d👩\u200d👧\u200d👦 🙂🙃🏳️\u200d🌈 ☃️ \U0001f1e9\U0001f1ea", "1234 12.5 ½ ² ٣ Ⅷ 一二三 1st 3D x2 1,000",
    "a\x00b\x01c\x1cd\x1de\x1ff\x7fg\x85h\u200bi\ufeffj\u2028k\u00a0l\u3000m\u180en",
    "&lt;b&gt; &amp; &#39;quote&#39; <br/> &nbsp;",
    "!!!???...,,,;;; ((( ))) [] {} *&^%$#@~`|\\", "((masterpiece:1.3)), [bad], {x|y}, <lora:foo:1>", "<|endoftext|",
    "</w> a</w> b</w",
    "<|startoftext|> hello <|endoftext|> world<|endoftext|>x <|ENDOFTEXT|> <|StartOfText|>",
    "!<|endoftext|>! <|endoftext|><|endoftext|>",
    "\u0301\u0301 a\u0323\u0307 \uac00\u1100\u1161\u11a8 \u212b", "fox " * 100, "x" * 500, "🙂" * 100,
    "a" * 60 + "!" * 90 + "1" * 90, "foo_bar __init__", "http://example.com/a?b=c&d=e#f user@example.com",
    "\U0010ffff \ue000", "<toy> a <Toy>!<toy>s <toy", "…—–“”‘’ «»"]
PIECES = [
    *"aábcdefgAÉZ  \t\n'’!?,.-_<>|019½²東京アいΣσς🙂\u200d\u0301\u0308İßﬁ\u00a0\u3000\x85\x00\x1c",
    "'s", "'ll", "<|endoftext|>", "<|startoftext|>", " the", "ing ", "<toy>", " <toy> "]
START, END = "<|startoftext|>", "<|endoftext|>"


def trained(shuffle):
    """(vocabulary, merges) in CLIP's order, trained on CORPUS; `shuffle` ranks the merges as no training would."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", initial_alphabet=LETTERS,
                                             show_progress=False)
    model.train_from_iterator(CORPUS.replace(" ", "\n").splitlines(), trainer)
    merges = [tuple(m) for m in json.loads(model.to_str())["model"]["merges"]]
    if shuffle:
        random.Random(0).shuffle(merges)
    letters = sorted(LETTERS, key=lambda c: (c != "!", c))
    tokens = dict.fromkeys([*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), START, END])
    return {token: i for i, token in enumerate(tokens)}, merges


def token(content, **flags):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, **flags}


def files(style, vocab):
    """The other files by name, as published: Stable Diffusion 1, 2, XL's second, one with tokens of its own, and none."""
    named = {"bos_token": token(START), "eos_token": token(END), "unk_token": token(END)}
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"}
    if style == "none":
        return {}
    if style == "xl":
        added = {vocab[s]: token(s, special=True, normalized=s != "!") for s in ("!", START, END)}
        return {"tokenizer_config": {**config, "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!",
                                     "added_tokens_decoder": added}}
    pad = {"1": END, "2": "!", "own": END}[style]
    typed = {key: {"__type": "AddedToken", **value} for key, value in named.items()}
    found = {"tokenizer_config": {**config, **typed, "pad_token": pad}, "special_tokens_map": {**named, "pad_token": pad}}
    if style == "own":
        found["added_tokens"] = {"<toy>": len(vocab), "Zebra": len(vocab) + 1}
    return found


@pytest.mark.parametrize("style, shuffle", [("1", False), ("2", True), ("xl", False), ("own", False), ("none", False)])
@pytest.mark.parametrize("one", [False, True])
def test_tokenizer(style, shuffle, one, tmp_path):
    vocab, merges = trained(shuffle)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    for name, content in {**files(style, vocab), "vocab": vocab}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    want, folder = transformers.CLIPTokenizer.from_pretrained(tmp_path), tmp_path
    if one:
        folder = tmp_path / "one"
        want.save_pretrained(folder)
        assert (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists()
        want = transformers.CLIPTokenizer.from_pretrained(folder)
    got, rng = load_tokenizer(str(folder)), random.Random(1)
    assert (got.bos_id, got.eos_id, got.pad_id, got.max_length) == (want.bos_token_id, want.eos_token_id, want.pad_token_id, 77)
    for text in (texts := HARD + ["".join(rng.choices(PIECES, k=rng.randrange(60))) for _ in range(200)]):
        assert got.encode(text) == want(text, add_special_tokens=False)["input_ids"], repr(text)
    ours, theirs = got(texts), want(texts, padding="max_length", max_length=77, truncation=True, return_tensors="np")
    np.testing.assert_array_equal(ours.ids, theirs["input_ids"])
    np.testing.assert_array_equal(ours.mask, theirs["attention_mask"])
    for text, cut in zip(texts, ours.cut):
        assert cut == want.decode(want(text, add_special_tokens=False)["input_ids"][75:])
