"""BERT's tokeniser on a vocabulary made by hand. (tests/parity/test_more_pipelines.py compares it with transformers' on a trained one.)"""
import json

import numpy as np
import pytest

from ldm_jax.data.text import load_tokenizer
from ldm_jax.data.wordpieces import join, normalise, pieces, split_words
from ldm_jax.types import UserError

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "##a", "a", "cat", "##s", ",", "你", "cafe", "Cat", "café"]
ids = lambda *tokens: [VOCAB.index(token) for token in tokens]


def write(folder, one=None, vocab=VOCAB, **config):
    """A tokeniser's files: vocab.txt, or with `one` tokenizer.json, and what is said of it."""
    if one is None:
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab), encoding="utf-8")
    else:
        whole = {"model": {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(vocab)}, **one.get("model", {})},
                 "normalizer": {"type": "BertNormalizer", "lowercase": True, **one.get("normalizer", {})}}
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 6, **config}))
    return str(folder)


@pytest.mark.parametrize("text, words", [
    ("", []), (" \t\r\n\u3000\u2028", []), ("Don't STOP!!", ["don", "'", "t", "stop", "!", "!"]), ("$5+5=", ["$", "5", "+", "5", "="]),
    ("Café cafe\u0301 ÅÉ", ["cafe", "cafe", "ae"]), ("a你好b", ["a", "你", "好", "b"]), ("タワー", ["タワー"]),
    ("ΑΣ İ ẞ", ["ασ", "i", "ß"]),
    ("a\x00b\x1cc\u200bd\x85e\ufffdf\ue000g", ["abcdefg"]), ("a\u00a0b", ["a", "b"]), ("«x»…", ["«", "x", "»", "…"]),
    ("x🙂y", ["x🙂y"]), ("½", ["½"])])
def test_words(text, words):
    assert list(split_words(normalise(text))) == words


def test_each_step_where_it_is_asked_for():
    text = "É你"
    assert normalise(text, lowercase=False) == "E 你 " and normalise(text, strip_accents=False) == "é 你 "
    assert normalise(text, chinese=False) == "e你"


@pytest.mark.parametrize("word, found", [
    ("unaffable", ["un", "##aff", "##able"]), ("cats", ["cat", "##s"]), ("aa", ["a", "##a"]), ("unx", []), ("able", []), ("", []),
    ("a" * 100, ["a", *["##a"] * 99]), ("a" * 101, [])])
def test_pieces(word, found):
    """The longest first, and nothing of a word that has a part without one."""
    vocab = {token: i for i, token in enumerate(VOCAB)}
    assert pieces(word, vocab) == found
    assert not found or join(found) == word


@pytest.mark.parametrize("one", [None, {}])
def test_ids(tmp_path, one):
    words = load_tokenizer(write(tmp_path, one))
    assert words.encode("Unaffable CATS, 你café dog") == ids("un", "##aff", "##able", "cat", "##s", ",", "你", "cafe", "[UNK]")
    assert words.encode("a[MASK]a [mask]") == [*ids("a", "[MASK]", "a"), *ids("[UNK]") * 3]
    got = words(["cat", "a, unaffable cats a"])
    np.testing.assert_array_equal(got.ids, [ids("[CLS]", "cat", "[SEP]", *["[PAD]"] * 3), ids("[CLS]", "a", ",", "un", "##aff", "[SEP]")])
    np.testing.assert_array_equal(got.mask.sum(1), [3, 6])
    assert got.cut == ("", "able cats a")


def test_options(tmp_path):
    cased = load_tokenizer(write(tmp_path, do_lower_case=False))
    assert cased.encode("Cat CAT café") == ids("Cat", "[UNK]", "café")
    assert load_tokenizer(write(tmp_path, do_lower_case=False, strip_accents=True)).encode("Cat café") == ids("Cat", "cafe")
    assert load_tokenizer(write(tmp_path, tokenize_chinese_chars=False)).encode("a你") == ids("[UNK]")
    assert load_tokenizer(write(tmp_path, tokenizer_class="BertTokenizerFast")).encode("a你") == ids("a", "你")
    assert load_tokenizer(write(tmp_path, tokenizer_class=None), "BertTokenizer").encode("a") == ids("a")


@pytest.mark.parametrize("files, words", [
    (dict(do_basic_tokenize=False), "do_basic_tokenize=False"), (dict(never_split=["a"]), "never_split="),
    (dict(one={"normalizer": {"clean_text": False}}), "clean_text=False"),
    (dict(one={"model": {"continuing_subword_prefix": "@@"}}), "continuing_subword_prefix='@@'"),
    (dict(one={"model": {"type": "BPE"}}), "type='BPE'"), (dict(vocab=[]), "does not give ids"),
    (dict(one={}, do_lower_case=False), "do_lower_case=False beside lowercase=True in tokenizer.json"),
    (dict(vocab=VOCAB[5:], added_tokens_decoder={3: {"content": "[SEP]"}}), "'.SEP.' has the id 3 where")])
def test_refused(tmp_path, files, words):
    with pytest.raises(UserError, match=words):
        load_tokenizer(write(tmp_path, **files))


def test_no_files(tmp_path):
    with pytest.raises(UserError, match="no tokeniser in .*; it needs vocab.txt, or tokenizer.json"):
        load_tokenizer(str(tmp_path), "BertTokenizer")
