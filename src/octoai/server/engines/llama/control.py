"""What llama.cpp's server is asked beside generating: the tokens of a prompt; to save a slot, and to restore one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import orjson

from octoai.server.engines.base import LONGEST_CONTEXT, Generation
from octoai.server.engines.llama.special import SpecialTokens
from octoai.server.engines.openai.dialects import DIALECTS
from octoai.server.engines.openai.exchange import Pool
from octoai.server.engines.openai.refusals import prompt_param, text_only
from octoai.server.errors import BadRequest, ContextLengthExceeded

MAX_SAID_BYTES = 64 * 1024 * 1024
ASK_SECONDS = 60.0  # a step of reading, and a large file on a slow disk
_ASKED = DIALECTS["llama.cpp"]


class Refused(Exception):
    """The server did not do it, or did not answer; the text says why."""


class Control:
    """`socket` is the path of the server's unix socket, `key` its bearer token; `special` and `context_length` are the
    model's."""

    def __init__(self, socket: str, key: str, model: str, special: SpecialTokens, context_length: int | None) -> None:
        self._model = model
        self._special = special
        self._context_length = context_length or LONGEST_CONTEXT
        self._pool = Pool(f"unix:{socket}", key=key, keeps_alive=False)

    def close(self) -> None:
        self._pool.close()

    async def tokens(self, generation: Generation) -> Sequence[int]:
        """The prompt as the server will read it. Raises Refused; ContextLengthExceeded where special tokens alone are
        too many, and BadRequest for images: the weights that it would see them with are never loaded."""
        if generation.tokens is not None:
            return generation.tokens
        text = generation.text
        if text is None:
            if generation.has_images:
                raise text_only()
            # Of all that may be in the body only what the template sees matters. A grammar would be made of a schema.
            asked = _ASKED.body(replace(generation, logit_bias={}, schema=None), self._model)
            text = (await self._ask("/apply-template", asked)).get("prompt")
        content: str | list[str] | None = text
        if isinstance(text, str) and self._special.is_slow(text):
            content = await asyncio.to_thread(self._special.pieces, text, self._context_length)
            if content is None:
                num_tokens, param = self._context_length + 1, prompt_param(generation)
                raise ContextLengthExceeded(num_tokens, self._context_length, param=param, is_least=True)
        body = orjson.dumps({"content": content, "add_special": True, "parse_special": True})
        tokens = (await self._ask("/tokenize", body)).get("tokens")
        if not isinstance(tokens, list):
            raise Refused("it did not tell tokens")
        return tokens or self._beginning(generation)

    def _beginning(self, generation: Generation) -> Sequence[int]:
        """In place of a prompt without tokens, of which the server makes nothing: what a text begins with. Raises
        BadRequest where that is not known."""
        if generation.messages is not None:
            return ()
        if self._special.begin is None:
            raise BadRequest("prompt: must not be empty: this model has no token that begins a text", param="prompt")
        return (self._special.begin,)

    def check_at_once(self, tokens: Sequence[int], generation: Generation) -> None:
        """The server is to make these tokens by itself. Raises BadRequest where that takes far too long."""
        if self._special.is_too_slow(tokens, generation.num_prompt_bytes):
            raise BadRequest(
                "messages: too many special tokens for so long a text: leave out those that stand in the messages",
                param="messages",
            )

    async def template(self) -> str:
        """Of chats, as the model has it. Raises Refused."""
        template = (await self._ask("/props")).get("chat_template")
        if not isinstance(template, str):
            raise Refused("it did not tell a template")
        return template

    async def save(self, slot: int, name: str) -> None:
        """Write what the slot holds to a file of this name, in the server's directory. Raises Refused."""
        await self._ask(f"/slots/{slot}?action=save", orjson.dumps({"filename": name}))

    async def restore(self, slot: int, name: str) -> None:
        """The slot holds what is in the file, and nothing else. Raises Refused."""
        await self._ask(f"/slots/{slot}?action=restore", orjson.dumps({"filename": name}))

    async def _ask(self, path: str, body: bytes | None = None) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                with closing(self._pool.exchange("GET" if body is None else "POST", path, body or b"")) as exchange:
                    status = await exchange.answered(ASK_SECONDS)
                    said = orjson.loads(await exchange.body(MAX_SAID_BYTES, ASK_SECONDS))
        except (OSError, ValueError) as failure:  # TimeoutError is an OSError
            raise Refused(str(failure) or type(failure).__name__) from None
        if status != 200 or not isinstance(said, dict):
            error = said.get("error") if isinstance(said, dict) else None
            raise Refused(str(error.get("message") if isinstance(error, dict) else status)[:200])
        return said
