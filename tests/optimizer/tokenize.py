"""Texts taken apart by kernels' own way beside the engine's: `python -m tests.optimizer.tokenize KERNELS MODEL`.

Prints one line of JSON: how many texts there were, those of which the tokens differ, and how much of its time it takes
for a text that begins as the last one did.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from octoai.optimizer.ggml import function
from octoai.optimizer.logits import _Settings
from tests.optimizer.loaded import Loaded

NUM_TEXTS = 3_000
ROOM = 100_000
WORDS = (
    "sea",
    " the",
    "The ",
    "  ",
    "\n",
    "\n\n",
    "1234",
    "éß",
    "日本",
    "🙂",
    "<|im_",
    "start|>",
    "|>",
    "<",
    "<|",
    "system\n",
)
_KINDS = (
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_bool,
    ctypes.c_bool,
)


class Tokenizers:
    """Of the engine, and the one that takes its place."""

    def __init__(self, path: Path, weights: Path) -> None:
        self._loaded = Loaded(path)
        defaults = function("llama_model_default_params", _Settings)()
        load = function("llama_model_load_from_file", ctypes.c_void_p, ctypes.c_char_p, _Settings)
        get_vocabulary = function("llama_model_get_vocab", ctypes.c_void_p, ctypes.c_void_p)
        self._vocabulary = get_vocabulary(load(os.fsencode(weights), defaults))
        self._own = function("llama_tokenize", ctypes.c_int32, *_KINDS)
        self._fast = ctypes.CFUNCTYPE(ctypes.c_int32, *_KINDS)(("shared_tokenize", ctypes.CDLL(str(path))))

    def specials(self) -> list[str]:
        get_text = function("llama_vocab_get_text", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32)
        return [get_text(self._vocabulary, token).decode() for token in range(17)]

    def tokens(self, text: str, *, is_fast: bool, room: int = ROOM, flags: tuple[bool, bool] = (True, True)) -> Any:
        """The number that is returned, and the tokens."""
        found, data = (ctypes.c_int32 * room)(), text.encode()
        tokenize = self._fast if is_fast else self._own
        number = tokenize(self._vocabulary, data, len(data), ctypes.addressof(found), room, *flags)
        return number, found[: max(0, number)]


def a_text(chosen: random.Random, specials: list[str], before: list[str]) -> str:
    """Most begin as an earlier one, cut anywhere or behind a special token; some are no more than that."""
    text = ""
    if before and chosen.random() < 0.8:
        text = chosen.choice(before[-20:])
        end = chosen.randrange(len(text) + 1)
        behind = max(text.rfind(each, 0, end) + len(each) for each in specials)
        text = text[: behind if chosen.random() < 0.4 else end]
        if chosen.random() < 0.3:
            return text
    for _ in range(chosen.randrange(0, 120)):
        text += chosen.choice(specials) if chosen.random() < 0.15 else chosen.choice(WORDS)
    return text


def main() -> None:
    tokenizers, chosen = Tokenizers(Path(sys.argv[1]), Path(sys.argv[2])), random.Random(1)
    specials, texts, different = tokenizers.specials(), list[str](), list[str]()
    for _ in range(NUM_TEXTS):
        texts.append(a_text(chosen, specials, texts))
        flags = (chosen.random() < 0.5, chosen.random() < 0.8)
        own = tokenizers.tokens(texts[-1], is_fast=False, flags=flags)
        fast = tokenizers.tokens(texts[-1], is_fast=True, flags=flags)
        narrow = [tokenizers.tokens(texts[-1], is_fast=is_fast, room=9, flags=flags) for is_fast in (False, True)]
        if own != fast or narrow[0] != narrow[1]:
            different.append(texts[-1])
    print(json.dumps({"texts": len(texts), "different": different, "share": share(tokenizers)}))


def share(tokenizers: Tokenizers) -> float:
    shared = (
        "<|im_start|>system\n" + "".join(f"Rule {at}: think of item {at * 7}. " for at in range(200)) + "<|im_end|>"
    )
    seconds = {False: 0.0, True: 0.0}
    for number in range(20):
        for is_fast in seconds:
            began = time.perf_counter()
            tokenizers.tokens(f"{shared}\n<|im_start|>user\nIs {number} odd?<|im_end|>", is_fast=is_fast)
            seconds[is_fast] += time.perf_counter() - began
    return seconds[True] / seconds[False]


if __name__ == "__main__":
    main()
