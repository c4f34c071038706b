"""The child process that asks a model for its next-token distributions: `python -m octoai.optimizer.logits`.

Reads one line of JSON from its standard input (`weights`, `text`, `output`, `max_positions`, `max_seconds`,
`num_threads`, `kernels`), reads the text once through llama.cpp, writes the logarithm of every token's probability
after every position to `output`, as rows of 32-bit floats, and says in one line of JSON how many rows of how many
tokens there are. It is a process of its own because its memory is the model's, and because a library may crash on
bad weights.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octoai.optimizer.ggml import function
from octoai.optimizer.weights import UnusableWeights, require_space
from octoai.server.engines.llama import kernels
from octoai.server.machine.parent import die_with_parent

POSITIONS_A_STEP = 16
"""Positions asked for at once: what a budget of time is checked between, and what memory for logits is bounded by."""

_DECODE = 1  # of llama_process_type
_POINTER = ctypes.c_void_p
_NUMBER = ctypes.c_int32


class _Settings(ctypes.Structure):
    """A structure of settings of unknown layout, larger than any: it is handed on as it came, with the defaults."""

    _fields_ = (("bytes", ctypes.c_uint8 * 4096),)


def main() -> None:
    die_with_parent()
    options = json.loads(sys.stdin.readline())
    try:
        if options["kernels"]:
            kernels.load(Path(options["kernels"]))
        model = Model(Path(options["weights"]), num_threads=options["num_threads"])
    except (Unloadable, kernels.CannotLoadKernels) as error:
        sys.exit(str(error))
    tokens = model.tokens(options["text"])[: options["max_positions"]]
    try:
        require_space(Path(options["output"]).parent, len(tokens) * model.num_tokens * np.dtype(np.float32).itemsize)
    except UnusableWeights as error:
        sys.exit(str(error))
    started, num_positions = time.monotonic(), 0
    with open(options["output"], "wb") as output:
        for rows in model.distributions(tokens):
            rows.tofile(output)
            num_positions += len(rows)
            if time.monotonic() - started > options["max_seconds"]:
                break
    print(json.dumps({"num_positions": num_positions, "num_tokens": model.num_tokens}), flush=True)
    os._exit(0)  # nothing to save, and freeing takes time


class Unloadable(Exception):
    """Weights that llama.cpp does not load."""


class Model:
    """A model and one context of llama.cpp with its default settings (512 positions), on the kernels that the server
    computes with. `num_tokens` is the size of the vocabulary."""

    def __init__(self, weights: Path, *, num_threads: int) -> None:
        function("llama_backend_init", None)()
        defaults = function("llama_model_default_params", _Settings)()
        load = function("llama_model_load_from_file", _POINTER, ctypes.c_char_p, _Settings)
        self._model = load(os.fsencode(weights), defaults)
        if not self._model:
            raise Unloadable(f"llama.cpp cannot load {weights}")
        defaults = function("llama_context_default_params", _Settings)()
        self._context = function("llama_init_from_model", _POINTER, _POINTER, _Settings)(self._model, defaults)
        if not self._context:
            raise Unloadable(f"llama.cpp has no room to run {weights}")
        self._call("llama_set_n_threads", None, (_NUMBER, num_threads), (_NUMBER, num_threads))
        self._vocabulary = function("llama_model_get_vocab", _POINTER, _POINTER)(self._model)
        self.num_tokens = function("llama_vocab_n_tokens", _NUMBER, _POINTER)(self._vocabulary)
        self.num_positions = self._call("llama_n_ctx", ctypes.c_uint32)

    def tokens(self, text: str) -> list[int]:
        """The text as tokens, with whatever begins a text for this model, as many as the context holds."""
        data = text.encode()
        room = len(data) + 8
        found = (_NUMBER * room)()
        kinds = (_POINTER, ctypes.c_char_p, _NUMBER, ctypes.POINTER(_NUMBER), _NUMBER, ctypes.c_bool, ctypes.c_bool)
        count = function("llama_tokenize", _NUMBER, *kinds)(self._vocabulary, data, len(data), found, room, True, False)
        return list(found[: max(0, count)])[: self.num_positions]

    def distributions(self, tokens: list[int]) -> Iterator[npt.NDArray[np.float32]]:
        """After each token, log probabilities of every next one: arrays of (some positions, num_tokens)."""
        batch = self._call("llama_batch_ext_init", _POINTER)
        for first in range(0, len(tokens), POSITIONS_A_STEP):
            step = tokens[first : first + POSITIONS_A_STEP]
            self._fill(batch, step, first)
            status = self._call("llama_process", _NUMBER, (_NUMBER, _DECODE), (_POINTER, batch))
            if status != 0:
                raise Unloadable(f"llama.cpp failed at position {first}: {status}")
            yield np.stack([self._log_probabilities(each) for each in range(len(step))])

    def _fill(self, batch: int, tokens: list[int], first: int) -> None:
        kinds = (_POINTER, _NUMBER)
        function("llama_batch_ext_clear", None, _POINTER)(batch)
        for offset, token in enumerate(tokens):
            at = function("llama_batch_ext_add_token", _NUMBER, *kinds, _NUMBER)(batch, 0, token)
            positions = (_NUMBER * 4)(first + offset)  # four, for models that see images
            function("llama_batch_ext_set_pos", ctypes.c_bool, *kinds, ctypes.POINTER(_NUMBER))(batch, at, positions)
            function("llama_batch_ext_set_output_logits", ctypes.c_bool, *kinds, ctypes.c_bool)(batch, at, True)

    def _log_probabilities(self, position: int) -> npt.NDArray[np.float32]:
        found = self._call("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), (_NUMBER, position))
        logits = np.ctypeslib.as_array(found, (self.num_tokens,)).astype(np.float64)
        logits -= logits.max()
        answer: npt.NDArray[np.float32] = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
        return answer

    def _call(self, name: str, answer: Any, *arguments: tuple[Any, Any]) -> Any:
        kinds, values = [kind for kind, _ in arguments], [value for _, value in arguments]
        return function(name, answer, _POINTER, *kinds)(self._context, *values)


if __name__ == "__main__":
    main()
