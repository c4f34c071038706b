"""Special tokens of a vocabulary, as <|im_end|>, and texts with very many of them.

llama.cpp looks for each special token of its vocabulary, the longest first, in everything that lies between those found
so far, and looks on to the end of the text every time. What that takes is the product of three numbers: how many are in
the text, how long it is, how many are looked for after them. A megabyte of little else keeps a core busy for minutes.
Such a text is cut in pieces here, where it makes no difference, and what has more of them than a context has tokens is
not read at all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from itertools import chain

from octoai.server.engines.llama.header import Vocabulary

MAX_LOOKED_THROUGH = 2 * 10**9  # characters at once: some 0.2 s
MAX_WITHOUT_PIECES = 10**11  # at worst some 15 s, where a text must not be cut
PIECE_CHARS = 16 * 1024
MAX_TOKEN_CHARS = 256  # of one that is compared with others
_KINDS = (2, 3, 4)  # of a token, as llama.cpp numbers them: unknown, control, user-defined
# Others put something in front of a text that is not put in front of what follows a special token.
_CUT_KINDS = ("gpt2", "llama")


class SpecialTokens:
    """Of a vocabulary; of none where it is not known. `begin` is the one that a text begins with."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        of = zip(vocabulary.tokens, vocabulary.types, strict=False) if vocabulary else ()
        ends = vocabulary.ends if vocabulary else ()
        special = {
            number: text for number, (text, kind) in enumerate(of) if text and (kind in _KINDS or number in ends)
        }
        self.begin = vocabulary.begin if vocabulary else None
        self._lengths_by_id = {number: len(text) for number, text in special.items()}
        self._texts = set(special.values())
        is_cut = vocabulary is not None and vocabulary.kind in _CUT_KINDS and not vocabulary.has_end
        self._apart = _apart(self._texts) if is_cut else set()
        self._marks = _marks(self._texts)
        self._lengths = {
            first: sorted({len(text) for text in self._texts if text[0] == first}, reverse=True)
            for first in {text[0] for text in self._texts}
        }
        self._first = re.compile("|".join(map(re.escape, self._lengths)))

    def is_slow(self, text: str) -> bool:
        """Whether it has to be looked at closely. Cheap, and true of some that would not have to be."""
        most = sum(map(text.count, self._marks))
        return most * len(text) * len(self._texts) > MAX_LOOKED_THROUGH

    def is_too_slow(self, tokens: Sequence[int], num_chars: int) -> bool:
        """Whether a text of so many characters, which are these tokens, takes far too long in one piece."""
        if len(tokens) * num_chars * len(self._lengths_by_id) <= MAX_WITHOUT_PIECES:
            return False
        counts, num_found, num_looks = Counter(tokens), 0, 0
        # The longest first; of those as long as each other any may be: the one that is there most often is the worst.
        for _, count in sorted(((length, counts[id_]) for id_, length in self._lengths_by_id.items()), reverse=True):
            num_found += count
            num_looks += 1 + num_found
        return num_looks * num_chars > MAX_WITHOUT_PIECES

    def pieces(self, text: str, most: int) -> list[str] | None:
        """The text in pieces that come to the same tokens. None where more than `most` special tokens are in it."""
        pieces, begin, last = [], 0, 0
        for number, (start, special) in enumerate(self._found(text)):
            if number >= most:
                return None
            if start - begin >= PIECE_CHARS and last > begin:
                pieces.append(text[begin:last])
                begin = last
            if special in self._apart:
                last = start
        if len(text) - begin >= PIECE_CHARS and last > begin:
            pieces.append(text[begin:last])
            begin = last
        return [*pieces, text[begin:]]

    def _found(self, text: str) -> Iterator[tuple[int, str]]:
        """Where they begin, and the longest of those that begin there."""
        at = 0
        while (first := self._first.search(text, at)) is not None:
            at = first.start()
            lengths = self._lengths[first[0]]
            special = next((text[at : at + each] for each in lengths if text[at : at + each] in self._texts), "")
            if special:
                yield at, special
            at += len(special) or 1


def _apart(texts: Set[str]) -> set[str]:
    """Those in front of which a text may be cut: none can have a part of one of them and more of the text, be it in
    front or behind."""
    if any(len(text) > MAX_TOKEN_CHARS for text in texts):
        return set()
    begins, ends = set(chain.from_iterable(map(_begins, texts))), set(chain.from_iterable(map(_ends, texts)))
    apart = {text for text in texts if ends.isdisjoint(_begins(text)) and begins.isdisjoint(_ends(text))}
    for text in texts:
        inner = texts & {text[start:end] for start in range(1, len(text)) for end in range(start + 1, len(text) + 1)}
        apart -= {text, *inner} if inner else inner
    return apart


def _begins(text: str) -> list[str]:
    return [text[:end] for end in range(1, len(text))]


def _ends(text: str) -> list[str]:
    return [text[start:] for start in range(1, len(text))]


def _marks(texts: Set[str]) -> list[str]:
    """Characters of which every text has at least one; rather those that are no letters."""
    left, marks = list(texts), []
    while left:
        counts = Counter(character for text in left for character in set(text))
        marks.append(max(sorted(counts), key=lambda each: (not each.isalnum(), counts[each])))
        left = [text for text in left if marks[-1] not in text]
    return marks
