"""The text tower and the tokeniser of LDM's text-to-image against diffusers and transformers."""
import dataclasses
import random
import re

import jax
import numpy as np
import pytest

from ldm_jax.data.text import load_tokenizer
from ldm_jax.published import load_net
from ldm_jax.types import UserError
from tests.parity.peers import bert, bert_tokenizer
from tests.parity.test_clip_text import CORPUS, HARD, PIECES

torch = pytest.importorskip("torch")

OWN = [
    "unaffableness embeddingly", "a你b好c", "豈更車 𠀀𪜀𫝀 \U0002b820\U0002b920 ㍿ 〇々 ㄅ ア", "cat🙂cat 一", "$5 €5 5% a+b=c ^~`|<>",
    "a\u00ado\ufffdp\ue000q\U0010ffffr\u0378s", "[UNK] [MASK]cat [CLS][SEP] [PAD] [mask] [ MASK ] [[MASK]] ##cat # #a",
    "x" * 100, "x" * 101, "the" * 40, "é" * 60, "cat," * 60, "¿¡ ‹› „ ‽ ⸮ 、。「」", "İ ı ſ K Å Ω ﬀ ŉ ǰ ΐ և ẖ ﬓ"]
PARTS = [*PIECES, *"[]#~$🙂你", "[MASK]", " [UNK] ", "##a"]
CONFIGS = {
    "published": {"model_max_length": 512, "do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True},
    "bare": {}, "cased": {"do_lower_case": False}, "accents": {"strip_accents": False, "tokenize_chinese_chars": False},
    "cased, no accents": {"do_lower_case": False, "strip_accents": True},
    "own tokens": {"pad_token": "!", "added_tokens_decoder": {0: {"content": "[CLS]", "lstrip": True, "special": True}}}}


@pytest.mark.parametrize("name", CONFIGS)
def test_tokenizer(name, tmp_path):
    letters = "".join([*PARTS, *HARD[:9]]).translate(dict.fromkeys(map(ord, "qQ🙂?…一東")))  # those stay unknown
    want, rng = bert_tokenizer(tmp_path / "words", CORPUS, letters, **CONFIGS[name]), random.Random(1)
    want.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "tokenizer.json").exists() and not (tmp_path / "one" / "vocab.txt").exists()
    texts = [*HARD, *OWN, *("".join(rng.choices(PARTS, k=rng.randrange(60))) for _ in range(200))]
    for folder in ("words", "one"):
        words = load_tokenizer(str(tmp_path / folder))
        assert words.max_length == CONFIGS[name].get("model_max_length", 77)
        for text in texts:
            assert words.encode(text) == want(text, add_special_tokens=False)["input_ids"], repr(text)
        got = dataclasses.replace(words, max_length=77)(texts)
        theirs = want(texts, padding="max_length", max_length=77, truncation=True, return_tensors="np")
        np.testing.assert_array_equal(got.ids, theirs["input_ids"])
        np.testing.assert_array_equal(got.mask, theirs["attention_mask"])
        for text, cut in zip(texts, got.cut):
            left = want.convert_ids_to_tokens(want(text, add_special_tokens=False)["input_ids"][75:])
            assert cut == re.sub("^##", "", " ".join(left).replace(" ##", ""))
    assert sum(map(bool, got.cut)) > 5 and 0.01 < np.mean(got.ids[got.mask] == want.unk_token_id) < 0.5


@pytest.mark.parametrize("options", [{}, dict(activation_function="gelu_new", encoder_attention_heads=1, head_dim=12,
                                              encoder_layers=3)], ids=["narrow heads", "one head"])
def test_tower(options, tmp_path):
    model = bert(50, **options)
    model.save_pretrained(tmp_path)
    net, params = load_net(str(tmp_path))
    ids = np.random.default_rng(0).integers(0, 50, (3, 77))
    with torch.no_grad():
        want = model(torch.tensor(ids), output_hidden_states=True, return_dict=True)
    got = jax.jit(lambda p, i: net.apply(p, i, hidden=True))(params, ids.astype(np.int32))
    assert got.pooled is None and got.projected is None
    np.testing.assert_allclose(got.last, want.last_hidden_state, atol=1e-4)
    np.testing.assert_allclose(got.hidden[:-1], np.stack([h.numpy() for h in want.hidden_states[:-1]]), atol=1e-4)


def test_a_missing_array_is_named(tmp_path):
    model = bert(50)
    del model.model.layers[1].self_attn.k_proj
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model.layers.1.self_attn.k_proj.weight"):
        load_net(str(tmp_path))
