"""Small random models of diffusers and transformers, and how pictures made by them are compared with those made here."""
import json
import sys
import unicodedata

import numpy as np
import pytest

from ldm_jax.data.bytepairs import LETTERS

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE, STEPS = 1e-3, 5
SCALED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
U_NET = dict(sample_size=4, block_out_channels=(8, 12), norm_num_groups=4, layers_per_block=1)
PLAIN = dict(U_NET, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
             attention_head_dim=4)
CROSS = dict(U_NET, cross_attention_dim=12, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
CODER = dict(block_out_channels=(8, 12), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
             up_block_types=("UpDecoderBlock2D",) * 2, sample_size=8)
XL = dict(CROSS, cross_attention_dim=12 + 8, addition_embed_type="text_time", addition_time_embed_dim=6,
          use_linear_projection=True, projection_class_embeddings_input_dim=10 + 6 * 6)
PROMPTS, NEGATIVE = ["a Cat, at dawn", "an ox (big)"], ["bad", "ugly fox"]
WORDS = "cat dawn ox fox big bad"


def randomise(model, seed=0):
    """No parameter is zero, nor such that a sum explodes; no answer is so small that it does not matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise * (1.0 if "embedding" in name else float(np.prod(p.shape[1:])) ** -0.5)
        else:
            p.data = 0.2 * noise + float("norm" in name and name.endswith("weight"))
    return model.eval()


def tokenizer(folder, pad):
    letters = sorted(LETTERS, key=lambda c: (c != "!", c))
    merges = list(dict.fromkeys((word[:i], word[i] + ("</w>" if i + 1 == len(word) else ""))
                                for word in WORDS.split() for i in range(1, len(word))))
    tokens = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "pad_token": pad}))
    return transformers.CLIPTokenizer.from_pretrained(folder)


BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def bert_tokenizer(folder, text=WORDS, letters="", **config):
    """A vocabulary of word pieces trained on a text and the letters, one in a line, and what is said of it."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    bare = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    model.train_from_iterator([f"{text} {bare}"] * 3, vocab_size=600, min_frequency=1, show_progress=False)
    letters = {c for form in ("NFC", "NFD") for c in unicodedata.normalize(form, letters + letters.lower()) if not c.isspace()}
    vocab = {*model.get_vocab(), *letters, *("##" + c for c in letters)}
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocab, key=lambda t: (t not in BERT_SPECIALS, t))),
                                      encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
    return transformers.BertTokenizer.from_pretrained(folder)


def bert(vocab_size, **options):
    """The text tower of LDM's text-to-image."""
    ldm = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
    return randomise(ldm.LDMBertModel(ldm.LDMBertConfig(**{**dict(
        vocab_size=vocab_size, encoder_layers=2, encoder_ffn_dim=20, encoder_attention_heads=3, head_dim=5, d_model=12), **options})))


def tower(words, kind=transformers.CLIPTextModel, **options):
    return randomise(kind(transformers.CLIPTextConfig(**{**dict(
        vocab_size=len(words), hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id), **options})))


def saved(pipeline, folder):
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(shape, n=2, seed=3):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def nchw(a):
    return torch.from_numpy(a.transpose(0, 3, 1, 2).copy())


def close(got, want):
    assert got.shape == want.shape and 0.05 < np.std(want) and np.mean((want > 0.01) & (want < 0.99)) > 0.2
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def started_from(pipeline, monkeypatch, *draws):
    """The peer's draws, in their order."""
    left = iter([nchw(x) for x in draws])
    for module in {sys.modules[type(pipeline).__module__], sys.modules[type(pipeline.scheduler).__module__]}:
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: next(left), raising=False)


SCHEDULERS = {
    "pndm": (diffusers.PNDMScheduler, dict(SCALED, skip_prk_steps=True, steps_offset=1)),
    "euler": (diffusers.EulerDiscreteScheduler, dict(SCALED, steps_offset=1, timestep_spacing="leading")),
    "euler-v": (diffusers.EulerDiscreteScheduler, dict(SCALED, prediction_type="v_prediction", timestep_spacing="trailing",
                                                       rescale_betas_zero_snr=True)),
    "dpm-karras": (diffusers.DPMSolverMultistepScheduler, dict(SCALED, use_karras_sigmas=True)),
}


def scheduler(name):
    kind, options = SCHEDULERS[name]
    return kind(**options)
