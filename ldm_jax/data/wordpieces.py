"""Word pieces (Schuster & Nakajima 2012) as BERT has them (Devlin et al. 2019): a text in words, and words in known parts.

A character is a mark, a control or a punctuation by Python's Unicode tables; the reference's are older (Unicode 8), so that
characters that came later, all of them rare, may be cut otherwise there.
"""
import unicodedata
from typing import Iterable, Iterator, List, Mapping

from ldm_jax.data.bytepairs import SPACES

INNER = "##"  # marks a piece that is not the first of its word
LONGEST = 100  # characters of a word that has pieces
_ASCII = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_CHINESE = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
            (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F))  # the last but one begins late in the reference, too


def _cleaned(c: str) -> str:
    if c in "\t\n\r":
        return " "
    if c in "\0\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Co"):
        return ""
    return " " if c in SPACES else c


def normalise(text: str, *, lowercase: bool = True, strip_accents: bool = True, chinese: bool = True) -> str:
    """Without controls; spaces around each Chinese character; in Unicode's form NFD without its accents; in lower case.

    Each of the last three where it is asked for. Lower case is letter by letter (a sigma at the end of a word is like any other).
    """
    text = "".join(map(_cleaned, text))
    if chinese:
        text = "".join(f" {c} " if any(a <= ord(c) <= b for a, b in _CHINESE) else c for c in text)
    if strip_accents:
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return "".join(c.lower() for c in text) if lowercase else text


def split_words(text: str) -> Iterator[str]:
    """What stands between spaces, and each punctuation by itself."""
    word = ""
    for c in text:
        apart = c in _ASCII or unicodedata.category(c)[0] == "P"
        if word and (apart or c in SPACES):
            yield word
            word = ""
        if apart:
            yield c
        elif c not in SPACES:
            word += c
    if word:
        yield word


def pieces(word: str, vocab: Mapping[str, int], longest: int = LONGEST) -> List[str]:
    """The longest known beginning, then the longest known INNER + beginning of the rest, and so on; [] for a word without pieces.

    A word of more than `longest` characters has none.
    """
    found, start = [], 0
    while start < len(word) <= longest:
        mark = INNER if start else ""
        end = next((end for end in range(len(word), start, -1) if mark + word[start:end] in vocab), None)
        if end is None:
            return []
        found.append(mark + word[start:end])
        start = end
    return found


def join(tokens: Iterable[str]) -> str:
    """The text of tokens, a space in front of each word."""
    return "".join(token.removeprefix(INNER) if token.startswith(INNER) else f" {token}" for token in tokens).strip()
