"""Texts that begin alike are taken apart as if nothing were remembered: over a tokenizer that is small enough to see
through, instead of llama.cpp's. The slow tests do the same with llama.cpp's own."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from octoai.optimizer import kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here")

SPECIALS = ("<|begin|>", "<|end|>")
WORDS = ("a", "aa", "aaa", "b", "<", "<|", "|>", "end|>", "\n")
ROOM = 4_000

# Letters are tokens, two alike in a row are one: what stands beside a letter decides, unless a special token does.
TOKENIZER = r"""
#include <cstdint>
#include <cstring>
typedef int32_t llama_token;
struct llama_vocab {};
enum { LLAMA_VOCAB_TYPE_BPE = 2 };
enum {
    LLAMA_TOKEN_ATTR_UNKNOWN = 1, LLAMA_TOKEN_ATTR_CONTROL = 8, LLAMA_TOKEN_ATTR_USER_DEFINED = 16,
    LLAMA_TOKEN_ATTR_RSTRIP = 256,
};
static const char * const specials[] = { "<|begin|>", "<|end|>" };
static int llama_vocab_type(const llama_vocab *) { return LLAMA_VOCAB_TYPE_BPE; }
static bool llama_vocab_get_add_eos(const llama_vocab *) { return false; }
static bool llama_vocab_get_add_sep(const llama_vocab *) { return false; }
static int32_t llama_vocab_n_tokens(const llama_vocab *) { return 2; }
static int llama_vocab_get_attr(const llama_vocab *, llama_token) { return LLAMA_TOKEN_ATTR_CONTROL; }
static const char * llama_vocab_get_text(const llama_vocab *, llama_token token) { return specials[token]; }
static llama_token special_at(const char * text, int32_t size) {
    for (llama_token each = 0; each < 2; ++each) {
        const int32_t length = (int32_t) strlen(specials[each]);
        if (length <= size && memcmp(text, specials[each], length) == 0) return each;
    }
    return -1;
}
extern "C" int32_t llama_tokenize(const llama_vocab *, const char * text, int32_t size, llama_token * tokens,
                                  int32_t room, bool adds_special, bool parses_special) {
    int32_t number = 0;
    const auto add = [&](llama_token token) { if (number++ < room) tokens[number - 1] = token; };
    if (adds_special) add(0);
    for (int32_t at = 0; at < size;) {
        const llama_token special = parses_special ? special_at(text + at, size - at) : -1;
        if (special >= 0) {
            add(special);
            at += (int32_t) strlen(specials[special]);
            continue;
        }
        const bool is_pair = at + 1 < size && text[at] == text[at + 1] &&
            !(parses_special && special_at(text + at + 1, size - at - 1) >= 0);
        add(text[at] + (is_pair ? 1000 : 0));
        at += is_pair ? 2 : 1;
    }
    return number > room ? -number : number;
}
"""

Tokenize = Callable[[str, bool, bool, int], tuple[int, list[int]]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenization")
    (place / "made.cpp").write_text(f'{TOKENIZER}\n#include "{Path(kernels.__file__).with_name("tokenization.cpp")}"\n')
    made = place / "made.so"
    command = ["g++", "-std=gnu++17", "-O1", "-fPIC", "-shared", str(place / "made.cpp"), "-o", str(made)]
    subprocess.run(command, check=True)
    return made


def tokenizers(library: Path, place: Path) -> tuple[Tokenize, Tokenize]:
    """Without a memory, and with one of its own, which is empty."""
    loaded = ctypes.CDLL(str(shutil.copy(library, place / "fresh.so")))

    def of(name: str) -> Tokenize:
        def tokens(text: str, adds_special: bool, parses_special: bool, room: int) -> tuple[int, list[int]]:
            found, data = (ctypes.c_int32 * room)(), text.encode()
            function = getattr(loaded, name)
            flags = (ctypes.c_bool(adds_special), ctypes.c_bool(parses_special))
            number = function(ctypes.c_void_p(1), data, ctypes.c_int32(len(data)), found, ctypes.c_int32(room), *flags)
            return number, list(found[: max(0, number)])

        return tokens

    return of("llama_tokenize"), of("shared_tokenize")


def test_a_text_that_another_one_begins_with_has_none_of_its_tokens(library: Path, tmp_path: Path) -> None:
    own, shared = tokenizers(library, tmp_path)
    system = f"<|begin|>{'ab' * 200}<|end|>"
    shared(f"{system}<|begin|>what only another client knows<|end|>", True, True, ROOM)
    for _ in range(2):  # the second time it is remembered itself
        assert shared(system, True, True, ROOM) == own(system, True, True, ROOM)


def test_whatever_was_taken_apart_before_a_text_has_the_same_tokens(library: Path, tmp_path: Path) -> None:
    own, shared = tokenizers(library, tmp_path)
    chosen, texts = random.Random(1), [""]
    for _ in range(3_000):
        text = begun(chosen, chosen.choice(texts[-20:]))
        texts.append(text)
        arguments = (chosen.random() < 0.5, chosen.random() < 0.8, chosen.choice((ROOM, 9)))
        assert shared(text, *arguments) == own(text, *arguments)


def begun(chosen: random.Random, before: str) -> str:
    """As an earlier one, cut behind a special token or anywhere, and often no more than that."""
    special = chosen.choice(SPECIALS)
    behind = before.rfind(special, 0, chosen.randrange(len(before) + 1)) + len(special)
    text = before[: behind if chosen.random() < 0.5 else chosen.randrange(len(before) + 1)]
    if chosen.random() < 0.6 or not text:
        text += "".join(chosen.choice((*WORDS, *SPECIALS)) for _ in range(chosen.randrange(300)))
    return text
