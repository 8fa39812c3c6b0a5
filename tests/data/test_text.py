"""CLIP's tokeniser on a vocabulary made by hand. (tests/parity/test_clip_text.py compares it with transformers' on a trained one.)"""
import json
import random

import numpy as np
import pytest

from ldm_jax.data.bytepairs import LETTERS, merge, normalise, spell, split_words, unspell
from ldm_jax.data.text import load_tokenizer
from ldm_jax.types import UserError

MERGES = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("'", "s</w>"), ("Ã", "©</w>"), ("f", "Ã©</w>"),
          ("ca", "fÃ©</w>")]
PAIRS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *(a + b for a, b in MERGES), "<|startoftext|>", "<|endoftext|>"]
VOCAB = {token: i for i, token in enumerate(PAIRS)}
START, STOP = len(VOCAB) - 2, len(VOCAB) - 1
ids = lambda *tokens: [VOCAB[token] for token in tokens]


def write(folder, one=False, vocab=VOCAB, merges=MERGES, config=None, **files):
    """A tokeniser's files in one of the two layouts, and others by name."""
    if one:
        model = {"type": "BPE", "vocab": vocab, "merges": [" ".join(m) for m in merges]}
        files["tokenizer"] = {"model": model, **files.get("tokenizer", {})}
    else:
        files["vocab"] = vocab
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in merges), encoding="utf-8")
    for name, content in {**files, "tokenizer_config": {"model_max_length": 8, **(config or {})}}.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def test_bytes_as_letters():
    assert len({*LETTERS}) == 256 and all(letter.isprintable() and not letter.isspace() for letter in LETTERS)
    assert LETTERS[ord(" ")] == "Ġ" and LETTERS[ord("\n")] == "Ċ" and LETTERS[ord("a")] == "a" and LETTERS[0] == "Ā"
    assert spell("é!") == ["Ã", "©", "!</w>"] and unspell(["Ã", "©</w>", "!</w>"]) == "é !" and unspell(["Ã"]) == "\ufffd"


@pytest.mark.parametrize("text, words", [
    ("", []), (" \t\r\n\u3000\u2028\x85", []), ("A  CAT's", ["a", "cat", "'s"]),
    ("they'll'VE 'sup", ["they", "'ll", "'ve", "'s", "up"]),
    ("''s !'s", ["''", "s", "!'", "s"]), ("x2y 12½Ⅷ", ["x", "2", "y", "1", "2", "½", "ⅷ"]),
    ("wow!!! (a_b)", ["wow", "!!!", "(", "a", "_", "b", ")"]),
    ("e\u0301", ["é"]), ("x\u0301y", ["x", "\u0301", "y"]), ("ΑΣ ΟΣ", ["ασ", "οσ"]), ("東京タワー。", ["東京タワー", "。"]),
    ("a\x00b\x1cc\u200bd", ["a", "\x00", "b", "\x1c", "c", "\u200b", "d"]), ("🙂👍 x", ["🙂👍", "x"]), ("&amp;", ["&", "amp", ";"])])
def test_words(text, words):
    assert list(split_words(normalise(text))) == words


def test_merging_is_by_rank_then_from_the_left():
    """Ranks in an order that no training would give, against one merge after the other with nothing kept between."""
    rng = random.Random(0)
    for _ in range(300):
        tokens, ranks = ["a", "b", "c"], []
        for _ in range(rng.randrange(1, 12)):
            pair = (rng.choice(tokens), rng.choice(tokens))
            if pair not in ranks:
                ranks.append(pair)
                tokens.append("".join(pair))
        rng.shuffle(ranks)
        ranks = {pair: i for i, pair in enumerate(ranks)}
        symbols = want = [rng.choice("abc") for _ in range(rng.randrange(30))]
        while found := [(ranks[pair], i) for i, pair in enumerate(zip(want, want[1:])) if pair in ranks]:
            i = min(found)[1]
            want = [*want[:i], want[i] + want[i + 1], *want[i + 2:]]
        assert merge(symbols, ranks) == want


def test_a_long_word_takes_no_long_time():
    assert len(merge(["a"] * 200_000, {("a", "a"): 0, ("aa", "aa"): 1})) == 50_000


@pytest.mark.parametrize("one", [False, True])
def test_ids(tmp_path, one):
    tokenizer = load_tokenizer(write(tmp_path, one))
    cats = ids("the</w>", "cat</w>", "'s</w>", "cafÃ©</w>")
    assert tokenizer.encode("The CAT's\n café") == cats == tokenizer.encode("the cat's cafe\u0301")
    assert tokenizer.encode("cath") == ids("ca", "t", "h</w>")  # t h is no merge at the end of a word
    assert tokenizer.decode(cats) == "the cat 's café"
    got = tokenizer(["the", "", "the cat the cat the cat cath é"])
    assert got.ids.dtype == np.int32 and got.mask.dtype == bool
    the, cat = cats[:2]
    np.testing.assert_array_equal(got.ids, [[START, the, *[STOP] * 6], [START, *[STOP] * 7], [START, *[the, cat] * 3, STOP]])
    np.testing.assert_array_equal(got.mask.sum(1), [3, 2, 8])
    assert got.cut == ("", "", "cath é")
    assert tokenizer("the").ids.shape == (1, 8)


PAD = {"content": "!", "special": True}


@pytest.mark.parametrize("config, files", [
    ({"pad_token": "!"}, {}), ({}, {"special_tokens_map": {"pad_token": "!"}}),
    ({"pad_token": {"__type": "AddedToken", "content": "!"}}, {}),
    ({"pad_token": "!", "added_tokens_decoder": {VOCAB["!"]: PAD}}, {})])
def test_filling(tmp_path, config, files):
    """The token that fills up is as special as the others: written in a text it is found whole."""
    tokenizer = load_tokenizer(write(tmp_path, config=config, **files))
    np.testing.assert_array_equal(tokenizer("a").ids, [[START, *ids("a</w>"), STOP, *[VOCAB["!"]] * 5]])
    assert tokenizer.encode("a!!") == ids("a</w>", "!", "!")


def test_special_tokens_in_a_text(tmp_path):
    """Found before the text is cut, the longest first; a normalised one in any case; what is about them as they say."""
    added = [{"content": "<x>", "id": STOP + 1}, {"content": "<x>y", "id": STOP + 2, "lstrip": True, "rstrip": True},
             {"content": "Zed", "id": STOP + 3, "normalized": True}, {"content": "ab", "id": STOP + 4, "single_word": True}]
    bos = {"content": "<|startoftext|>", "normalized": True}
    tokenizer = load_tokenizer(write(tmp_path, one=True, tokenizer={"added_tokens": added}, config={"bos_token": bos}))
    assert tokenizer.encode("a<|endoftext|>a") == ids("a</w>", "<|endoftext|>", "a</w>")
    assert tokenizer.encode("<|STARTOFTEXT|>") == [START] and tokenizer.encode("<|ENDOFTEXT|>")[-1] == VOCAB[">"+"</w>"]
    assert tokenizer.encode("<x><x>y <X>") == [STOP + 1, STOP + 2, *ids("<</w>", "x</w>", "></w>")]
    assert tokenizer.encode("zED zed") == [STOP + 3, STOP + 3]
    assert tokenizer.encode("ab xab") == [STOP + 4, *ids("x", "a", "b</w>")]


def test_what_has_no_id_is_unknown(tmp_path):
    vocab = {token: i for token, i in VOCAB.items() if token != "z</w>"}
    assert load_tokenizer(write(tmp_path, vocab=vocab)).encode("az") == [VOCAB["a"], STOP]


@pytest.mark.parametrize("text", [5, None, "\ud800"])
def test_no_text(tmp_path, text):
    with pytest.raises(UserError, match="is not a prompt"):
        load_tokenizer(write(tmp_path))([text])


@pytest.mark.parametrize("files, words", [
    (dict(vocab='{"a":'), "vocab.json.*damaged"), (dict(vocab=[1]), "holds no object"), (dict(vocab={}), "does not give ids"),
    (dict(merges=[("a",)]), "merge 1 of the tokeniser, 'a'"),
    (dict(merges=[MERGES[0], ("ca", "q")]), "merge 2 of the tokeniser, 'ca q'"),
    (dict(config={"tokenizer_class": "T5Tokenizer"}), "'T5Tokenizer'; choose from: BertTokenizer, CLIPTokenizer"),
    (dict(config={"padding_side": "left"}), "padding_side='left'"), (dict(config={"model_max_length": 2}), "model_max_length=2"),
    (dict(config={"pad_token": {"lstrip": False}}), "pad_token of the tokeniser has no content"),
    (dict(added_tokens={"new": 7}), "'new' has the id 7 where the vocabulary makes it 522"),
    (dict(config={"added_tokens_decoder": {"x": {}}}), "tokeniser.*damaged"),
    (dict(one=True, tokenizer={"model": {"type": "Unigram"}}), "does not hold byte pairs")])
def test_refused(tmp_path, files, words):
    with pytest.raises(UserError, match=words):
        load_tokenizer(write(tmp_path, **files))


def test_no_files(tmp_path):
    with pytest.raises(UserError, match="no tokeniser in .*vocab.json and merges.txt, or tokenizer.json"):
        load_tokenizer(str(tmp_path))
