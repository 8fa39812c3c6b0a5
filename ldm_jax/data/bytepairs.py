"""Byte pairs (Sennrich et al. 2016) as CLIP has them: a text in lower case, cut into words, and the words' bytes merged."""
import heapq
import re
import unicodedata
from typing import Iterable, Iterator, List, Mapping, Sequence, Tuple

END = "</w>"  # marks the last letter of a word
SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"  # White_Space
CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")


def byte_letters() -> List[str]:
    """The printable letter of each byte: its own in Latin-1 where that is printable, otherwise the next one from U+0100 on."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in own else next(others)) for b in range(256)]


LETTERS = byte_letters()
BYTES = {letter: b for b, letter in enumerate(LETTERS)}


def normalise(text: str) -> str:
    """NFC, runs of spaces as one, lower case letter by letter (a sigma at the end of a word is like any other)."""
    return "".join(c.lower() for c in re.sub(f"[{SPACES}]+", " ", unicodedata.normalize("NFC", text)))


def _kind(c: str) -> str:
    return " " if c == " " else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], ".")


def split_words(text: str) -> Iterator[str]:
    """The words of a normalised text."""
    kinds, i = [_kind(c) for c in text], 0
    while i < len(text):
        kind, found = kinds[i], CONTRACTION.match(text, i)
        end = found.end() if found else i + 1
        while not found and kind != "N" and end < len(text) and kinds[end] == kind:
            end += 1
        if kind != " ":
            yield text[i:end]
        i = end


def spell(word: str) -> List[str]:
    """The bytes of a word as letters, the last one marked."""
    letters = [LETTERS[b] for b in word.encode()]
    return [*letters[:-1], letters[-1] + END]


def unspell(tokens: Iterable[str]) -> str:
    """The text of tokens, a space behind each word; bytes that are no UTF-8 come out as U+FFFD."""
    data = b"".join(bytes([BYTES[c]]) if c in BYTES else c.encode() for c in "".join(tokens))
    return data.decode(errors="replace").replace(END, " ").strip()


def merge(symbols: Sequence[str], ranks: Mapping[Tuple[str, str], int]) -> List[str]:
    """`symbols` after all merges: always the pair of the lowest rank, the leftmost of equals. n symbols take O(n log n)."""
    symbols, n = list(symbols), len(symbols)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [(ranks[pair], i, pair) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        _, i, pair = heapq.heappop(heap)
        j = after[i]
        if symbols[i] is None or j >= n or (symbols[i], symbols[j]) != pair:
            continue  # one of the two has gone into another merge since
        symbols[i], symbols[j], after[i] = symbols[i] + symbols[j], None, after[j]
        if after[i] < n:
            before[after[i]] = i
        for k, l in ((before[i], i), (i, after[i])):
            if k >= 0 and l < n and (symbols[k], symbols[l]) in ranks:
                heapq.heappush(heap, (ranks[symbols[k], symbols[l]], k, (symbols[k], symbols[l])))
    return [s for s in symbols if s is not None]
