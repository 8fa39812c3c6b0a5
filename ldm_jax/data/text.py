"""Texts to token ids: the tokenisers of CLIP (Radford et al. 2021) and of BERT (Devlin et al. 2019), from their own files.

CLIP's:

    1  special tokens, such as the end of a text, are found where they are written out
    2  the rest is put in Unicode's form NFC and in lower case, each letter by itself
    3  it is cut into words: a run of letters, a single digit, 's 't 're 've 'm 'll 'd, or a run of anything else but spaces
    4  a word is its UTF-8 bytes, each written as a printable letter, the last one marked as the end of the word
    5  the pair of neighbours that stands first in the list of merges is merged, until none stands in it

Files have it in one of two layouts: vocab.json and merges.txt, or both in tokenizer.json. tokenizer_config.json and
special_tokens_map.json name the special tokens: towers differ in the one that fills a text up. Nothing is repaired beforehand,
neither HTML entities nor wrongly decoded letters: the same as transformers from version 5 on.

BERT's has other steps 2 to 5, see wordpieces.py, and the file vocab.txt, a token in each line, in place of the first two.
"""
import dataclasses
import functools
import io
import json
import os
import re
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from ldm_jax import paths
from ldm_jax.data import bytepairs, wordpieces
from ldm_jax.data.bytepairs import SPACES
from ldm_jax.types import UserError, lookup

MAX_LENGTH = 77  # where the files do not say
ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Rules(NamedTuple):
    """Steps 2 to 5 of one kind of tokeniser.

    Attributes:
      normalise: a text -> its normal form. split: that -> its words.
      pieces: a word -> its tokens; none for a word that is unknown as a whole.
      join: tokens -> the text that they are of, as far as they tell.
    """
    normalise: Callable[[str], str]
    split: Callable[[str], Iterable[str]]
    pieces: Callable[[str], Sequence[str]]
    join: Callable[[Iterable[str]], str]


class Tokens(NamedTuple):
    """Texts as the tower takes them.

    Attributes:
      ids: int32 [B, L]: start, the text, end, then the filling.
      mask: bool [B, L], false at the filling.
      cut: for each text what of it did not fit, read back from its tokens; "" where all did.
    """
    ids: np.ndarray
    mask: np.ndarray
    cut: Tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Special:
    """A token that is found whole. normalized: after step 2, not in the text as given; *strip: it takes the spaces beside it."""
    content: str
    id: int
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def _cut_out(text: str, specials: Sequence[Special], key: Callable[[Special], str]) -> Iterator[Union[str, Special]]:
    """`text` in pieces: stretches of it, and the special tokens found between, the longest at each place."""
    table = {key(s): s for s in specials}
    if not table:
        yield text
        return
    done = 0
    for found in re.finditer("|".join(re.escape(s) for s in sorted(table, key=len, reverse=True)), text):
        special, start, stop = table[found[0]], found.start(), found.end()
        if special.single_word and (re.search(r"\w\Z", text[:start]) or re.match(r"\w", text[stop:])):
            continue
        start = max(done, len(text[:start].rstrip(SPACES))) if special.lstrip else start
        stop = len(text) - len(text[stop:].lstrip(SPACES)) if special.rstrip else stop
        yield text[done:start]
        yield special
        done = stop
    yield text[done:]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """One tokeniser; see the top of the file. `load_tokenizer` makes one from files.

    Attributes:
      vocab: token -> id. rules: how a text becomes tokens.
      specials: the tokens found whole.
      bos_id, eos_id, pad_id, unk_id: start, end, filling, and what has no id.
      max_length: of a text, start and end included.
    """
    vocab: Mapping[str, int]
    rules: Rules
    specials: Tuple[Special, ...]
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    max_length: int = MAX_LENGTH

    @functools.cached_property
    def _words(self) -> Dict[str, Tuple[int, ...]]:
        """The ids of words met before."""
        return {}

    @functools.cached_property
    def _tokens(self) -> Dict[int, str]:
        return {i: s for s, i in self.vocab.items()}

    def encode(self, text: str) -> List[int]:
        """The ids of one text, all of them, without start and end.

        Raises:
          UserError: for anything but a string that can be written as UTF-8.
        """
        if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{text!r:.60} is not a prompt; give a str of valid Unicode")
        ids = []
        given, later = ([s for s in self.specials if s.normalized == n] for n in (False, True))
        for piece in _cut_out(text, given, lambda s: s.content):
            if isinstance(piece, Special):
                ids.append(piece.id)
                continue
            for part in _cut_out(self.rules.normalise(piece), later, lambda s: self.rules.normalise(s.content)):
                words = () if isinstance(part, Special) else self.rules.split(part)
                ids.extend([part.id] if isinstance(part, Special) else (i for word in words for i in self._word(word)))
        return ids

    def _word(self, word: str) -> Tuple[int, ...]:
        if word not in self._words:
            ids = tuple(self.vocab.get(s, self.unk_id) for s in self.rules.pieces(word)) or (self.unk_id,)
            if len(word) > 100 or len(self._words) > 100_000:
                return ids
            self._words[word] = ids
        return self._words[word]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids in its normal form, its words apart; bytes that are no UTF-8 come out as U+FFFD."""
        return self.rules.join(self._tokens[int(i)] for i in ids)

    def __call__(self, texts: Union[str, Sequence[str]]) -> Tokens:
        """The ids of several texts, or of one, each cut or filled up to max_length; errors as `encode` has them."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        mask, cut, room = np.zeros(ids.shape, bool), [], self.max_length - 2
        for row, text in enumerate(texts):
            found = self.encode(text)
            whole = [self.bos_id, *found[:room], self.eos_id]
            ids[row, :len(whole)], mask[row, :len(whole)] = whole, True
            cut.append(self.decode(found[room:]))
        return Tokens(ids, mask, tuple(cut))


def load_tokenizer(directory: str, kind: Optional[str] = None) -> Tokenizer:
    """The tokeniser from a directory of its files: its vocabulary, or tokenizer.json, and what names special tokens.

    kind: a row of TOKENIZERS, where the files do not say; CLIP's by default.

    Raises:
      UserError: for files that are missing, damaged or do not fit together, for another kind of tokeniser, and for options that
        are not supported.
    """
    directory = paths.expand(directory)
    try:
        return _load(directory, kind)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"the files of the tokeniser in {directory!r} are damaged ({type(e).__name__}: {e})") from e


def _load(directory: str, kind: Optional[str]) -> Tokenizer:
    config = _json(directory, "tokenizer_config.json") or {}
    kind = config.get("tokenizer_class") or kind or "CLIPTokenizer"
    row = lookup(TOKENIZERS, kind.removesuffix("Fast"), "class of tokeniser")
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise UserError(f"{directory!r}: {side}={config[side]!r} of the tokeniser is not supported; it must be 'right'")
    whole = _json(directory, "tokenizer.json")
    vocab, rules = row.read(directory, config, whole)
    named = _named(directory, config, row.named)
    specials = _specials(directory, vocab, _added(directory, config, whole, named), named)
    ids = {**vocab, **{s.content: s.id for s in specials}}
    length = config.get("model_max_length", MAX_LENGTH)
    if not isinstance(length, int) or length < 3:
        raise UserError(f"{directory!r}: model_max_length={length!r} of the tokeniser must be an integer from 3")
    first, last, filling, unknown = (ids[named[key]["content"]] for key in (*row.ends, "pad_token", "unk_token"))
    return Tokenizer(ids, rules, specials, first, last, filling, unknown, length if length < 2**20 else MAX_LENGTH)


def _json(directory: str, name: str) -> Optional[Dict[str, Any]]:
    """A file of JSON, which holds an object; None where there is no such file."""
    path = os.path.join(directory, name)
    if not paths.isfile(path):
        return None
    try:
        value = json.loads(paths.read_text(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"cannot read {path!r}: {e}; the file is damaged") from e
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path!r}: it holds no object; the file is damaged")
    return value


def _check_vocab(directory: str, vocab: Any) -> None:
    if not vocab or not all(isinstance(s, str) and isinstance(i, int) for s, i in vocab.items()):
        raise UserError(f"{directory!r}: the tokeniser's vocabulary does not give ids for tokens; the file is damaged")


def _byte_pairs(directory: str, config: Mapping[str, Any], whole: Optional[Mapping[str, Any]]):
    """(vocabulary, Rules) of CLIP's tokeniser."""
    vocab, merges = _from_one(directory, whole) if whole else _from_two(directory)
    _check_vocab(directory, vocab)
    ranks = {}
    for rank, pair in enumerate(merges):
        unknown = [s for s in (*pair, "".join(pair)) if s not in vocab]
        if len(pair) != 2 or unknown:
            raise UserError(f"{directory!r}: merge {rank + 1} of the tokeniser, {' '.join(pair)!r}, is not of two tokens of the "
                            f"vocabulary that make a third; the file is damaged or belongs to another")
        ranks[pair] = rank
    return vocab, Rules(bytepairs.normalise, bytepairs.split_words, lambda word: bytepairs.merge(bytepairs.spell(word), ranks),
                        bytepairs.unspell)


def _word_pieces(directory: str, config: Mapping[str, Any], whole: Optional[Mapping[str, Any]]):
    """(vocabulary, Rules) of BERT's tokeniser."""
    model, path = (whole or {}).get("model") or {}, os.path.join(directory, "vocab.txt")
    if whole:
        vocab, form = model.get("vocab"), whole.get("normalizer") or {}
    elif paths.isfile(path):
        vocab, form = {line.rstrip("\n"): i for i, line in enumerate(io.StringIO(paths.read_text(path), newline=None))}, {}
    else:
        raise UserError(f"no tokeniser in {directory!r}; it needs vocab.txt, or tokenizer.json")
    only = {"type": (model, "WordPiece"), "continuing_subword_prefix": (model, wordpieces.INNER), "clean_text": (form, True),
            "do_basic_tokenize": (config, True), "never_split": (config, None)}
    options = {"do_lower_case": ("lowercase", True), "strip_accents": ("strip_accents", None),
               "tokenize_chinese_chars": ("handle_chinese_chars", True)}
    wrong = [f"{key}={part[key]!r}" for key, (part, allowed) in only.items() if part.get(key, allowed) != allowed]
    wrong += [f"{key}={config[key]!r} beside {other}={form[other]!r} in tokenizer.json" for key, (other, _) in options.items()
              if config.get(key, form.get(other)) != form.get(other, config.get(key))]
    if wrong:
        raise UserError(f"{directory!r}: the tokeniser has options that are not supported: {', '.join(wrong)}")
    _check_vocab(directory, vocab)
    lower, strip, chinese = (config.get(key, form.get(other, default)) for key, (other, default) in options.items())
    longest = model.get("max_input_chars_per_word", wordpieces.LONGEST)
    normalise = functools.partial(wordpieces.normalise, lowercase=lower, chinese=chinese,
                                  strip_accents=lower if strip is None else strip)
    return vocab, Rules(normalise, wordpieces.split_words, lambda word: wordpieces.pieces(word, vocab, longest), wordpieces.join)


class Row(NamedTuple):
    """A class of tokenisers.

    Attributes:
      named: its special tokens, where the files do not say. ends: the names of the first and the last token of a text.
      read: (directory, tokenizer_config.json, tokenizer.json or None) -> (vocabulary, Rules).
    """
    named: Mapping[str, str]
    ends: Tuple[str, str]
    read: Callable


_END = "<|endoftext|>"
TOKENIZERS = {
    "CLIPTokenizer": Row({"bos_token": "<|startoftext|>", "eos_token": _END, "unk_token": _END, "pad_token": _END},
                         ("bos_token", "eos_token"), _byte_pairs),
    "BertTokenizer": Row({f"{key}_token": f"[{key.upper()}]" for key in ("unk", "sep", "pad", "cls", "mask")},
                         ("cls_token", "sep_token"), _word_pieces),
}


def _from_one(directory: str, file: Mapping[str, Any]):
    model = file.get("model") or {}
    merges, vocab = model.get("merges"), model.get("vocab")
    if model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        raise UserError(f"{directory!r}: tokenizer.json does not hold byte pairs (model.type, model.vocab, model.merges)")
    return vocab, [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]


def _from_two(directory: str):
    vocab, path = _json(directory, "vocab.json"), os.path.join(directory, "merges.txt")
    if vocab is None or not paths.isfile(path):
        raise UserError(f"no tokeniser in {directory!r}; it needs vocab.json and merges.txt, or tokenizer.json")
    try:
        lines = [line.rstrip("\r") for line in paths.read_text(path).split("\n")]
    except ValueError as e:
        raise UserError(f"cannot read {path!r}: {e}; the file is damaged") from e
    return vocab, [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def _named(directory: str, config: Mapping[str, Any], usual: Mapping[str, str]) -> Dict[str, Any]:
    """The special tokens that have a name or stand in a list, by name, each as a dict with its content; the `usual` ones as well."""
    said = dict(config)
    if "added_tokens_decoder" not in config:
        said |= _json(directory, "special_tokens_map.json") or {}
    found = {**usual, **{key: value for key, value in said.items() if key.endswith("_token") and isinstance(value, (str, dict))}}
    more = [token for key in ("additional_special_tokens", "extra_special_tokens") for token in said.get(key) or []]
    found |= {f"extra_{i}": token for i, token in enumerate(more)}
    named = {key: {"content": token} if isinstance(token, str) else token for key, token in found.items()}
    bad = [key for key, token in named.items() if not isinstance(token.get("content"), str) or not token["content"]]
    if bad:
        raise UserError(f"{directory!r}: {bad[0]} of the tokeniser has no content; give it one")
    return named


def _added(directory: str, config: Mapping[str, Any], whole: Optional[Mapping[str, Any]], named: Mapping[str, Any]):
    """The tokens added to the vocabulary, by their ids: those of tokenizer_config.json, or else those of the other files."""
    if "added_tokens_decoder" in config:
        found = {int(i): token for i, token in config["added_tokens_decoder"].items()}
    else:
        names = {token["content"] for token in named.values()}
        listed = _json(directory, "added_tokens.json") or {}
        found = {i: {"content": content, "normalized": content not in names} for content, i in listed.items()}
        found |= {token["id"]: token for token in (whole or {}).get("added_tokens", [])}
    return [{**found[i], "id": i} for i in sorted(found)]


def _specials(directory: str, vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], named: Mapping[str, Any]):
    """The tokens found whole. A token that is added is as it is there, otherwise as it is named last.

    Ids that the vocabulary lacks follow its last.
    """
    fixed, chosen = {token["content"] for token in added}, {token["content"]: token for token in added}
    chosen |= {named[key]["content"]: named[key] for key in sorted(named, key=_place) if named[key]["content"] not in fixed}
    specials, following = [], len(vocab)
    for content, token in chosen.items():
        number = vocab.get(content, following)
        following += content not in vocab
        if token.get("id", number) != number:
            raise UserError(f"{directory!r}: the added token {content!r} has the id {token['id']} where the vocabulary makes it "
                            f"{number}; the files do not belong together")
        flags = {key: bool(token.get(key, False)) for key in ("normalized", "lstrip", "rstrip", "single_word")}
        specials.append(Special(content, number, **flags))
    return tuple(specials)


def _place(key: str) -> int:
    """Where the reference has a named token among the others."""
    return ORDER.index(key) if key in ORDER else len(ORDER)
