"""How a llama.cpp engine reads prompts: each beginning that several share once, and long ones in pieces.

llama.cpp keeps what it has read in the slot that read it, and slots share nothing. So the slot is chosen here; a
shared beginning is read by one request (others that begin with it wait), saved, and restored into other slots, which
takes milliseconds. Shared are the messages of the system, or what a prompt has in common with another recent one.
All accounts share them, as they share slots: who knows a whole beginning can tell that somebody else has sent it.

A long prompt is read in pieces, each a request to the engine: it fills its batches from the first slot on, and a
short prompt beside a long one would wait for all of it. Beside others the pieces are small: each is at most one step of
the engine, and a step is a gap in everybody's stream. Beside an answer that is on its way, short prompts are as well.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial

import orjson

from octoai.server.engines.base import Event, Finished, Generation, OnLeft, OnText, Started
from octoai.server.engines.llama.burst import Burst
from octoai.server.engines.llama.control import Control, Refused
from octoai.server.engines.llama.prefixes import Prefixes
from octoai.server.engines.llama.prompt import Prompt
from octoai.server.engines.llama.slots import TOKEN_BYTES, Slots, num_common, packed
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.engines.openai.refusals import prompt_param
from octoai.server.errors import ContextLengthExceeded

log = logging.getLogger("octoai.engine")

MIN_SHARED_TOKENS = 128  # fewer are read in one step
PIECE_TOKENS = 512
# While others are served. One token shares a step with theirs; the rest is a step of its own, which llama.cpp's own
# attention takes in tiles of 64: with it, a piece of 65 takes half the time of one of 64.
PIECE_TOKENS_BESIDE = 129
# In a template: the engine takes what the model thinks out of the answer to a chat, or ends it where that says.
_NOT_PLAIN = re.compile("think|thought|reason|channel|</assistant>", re.IGNORECASE)
NUM_RECENT = 16
NUM_HEADS = 64


class Reading:
    """The prompts of one child, and its slots. `on_turn` is called when a request has its turn."""

    def __init__(
        self,
        http: OpenAIEngine,
        control: Control,
        prefixes: Prefixes,
        num_slots: int,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_in_line = 0  # who wait for others, not for the engine
        self._http = http
        self._on_turn = on_turn
        self._control = control
        self._prefixes = prefixes
        self._slots = Slots(num_slots)
        self._turns = asyncio.Semaphore(num_slots)
        self._num_answering = 0  # requests whose first token is there
        self._recent: deque[bytes] = deque(maxlen=NUM_RECENT)
        self._heads: OrderedDict[bytes, bytes] = OrderedDict()
        self._being_read: dict[bytes, asyncio.Event] = {}
        self._burst = Burst()
        self._is_plain: bool | None = None
        self._saving: set[asyncio.Task[None]] = set()
        self._settling: set[asyncio.Future[None]] = set()

    async def close(self) -> None:
        for task in self._saving:
            task.cancel()
        await asyncio.gather(*self._saving, *self._settling, return_exceptions=True)
        self._control.close()

    async def generate(
        self, generation: Generation, on_left: OnLeft | None, on_text: OnText | None
    ) -> AsyncGenerator[Sequence[Event]]:
        """As of an `Engine`. The slot is free before the end of the answer is given: who reads it may take long."""
        end: Sequence[Event] = ()
        async with self._turn():
            prompt, has_begun = Prompt(), False
            self._burst.arrive(prompt)
            try:
                await self._know(prompt, generation)
                await self._until_others_have_read(prompt)
                await self._read(prompt, self._take_slot(prompt))
                await self._join(prompt)
                told = None if on_left is None else partial(_told, on_left, prompt)
                answered = self._http.generate(self._asked(generation, prompt), told, on_text)
                async with aclosing(answered) as batches:
                    async for batch in batches:
                        self._num_answering += not has_begun
                        has_begun = True
                        if isinstance(batch[-1], Finished):
                            end = prompt.counted(batch)
                            break
                        yield prompt.counted(batch)
            finally:
                self._burst.end(prompt)
                self._num_answering -= has_begun
                if prompt.slot >= 0:
                    self._slots.put_back(prompt.slot, prompt.held, self._num_saved(prompt))
                if on_left is not None and prompt.num_read and not prompt.is_counted:
                    on_left((Started(prompt.num_read, prompt.num_read - prompt.num_computed),))
        yield end

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        self.num_in_line += 1
        try:
            await self._turns.acquire()
        finally:
            self.num_in_line -= 1
        self._on_turn()
        try:
            yield
        finally:
            self._turns.release()

    async def count_tokens(self, generation: Generation) -> int | None:
        """As of an `Engine`."""
        try:
            return len(await self._control.tokens(generation))
        except Refused:
            return await self._http.count_tokens(generation)  # says why

    def _asked(self, generation: Generation, prompt: Prompt) -> Generation:
        """No more than there is room for, also where the engine has rounded that up. With the prompt's tokens, so that
        the engine does not make them again, where that is the only difference."""
        most = generation.max_tokens
        if self._http.context_length is not None:
            most = min(most, self._http.context_length - len(prompt.tokens))
        asked = replace(generation, slot=prompt.slot, max_tokens=most)
        return replace(asked, messages=None, text=None, tokens=prompt.tokens) if prompt.goes_as_tokens else asked

    async def _join(self, prompt: Prompt) -> None:
        """What is left to read of it, if it is little, goes into one step with what is left of others."""
        if len(prompt.tokens) - max(prompt.num_held, prompt.num_read) > MIN_SHARED_TOKENS:
            self._burst.end(prompt)
        else:
            await self._burst.join(prompt)

    async def _know(self, prompt: Prompt, generation: Generation) -> None:
        """It stays empty where the engine does not tell: that will say why when it is to answer. One that does not fit
        is not shown to the engine, which might make its tokens once more, nor one of which that takes too long."""
        try:
            tokens = await self._control.tokens(generation)
            limit = self._http.context_length
            if limit is not None and len(tokens) >= limit:
                raise ContextLengthExceeded(len(tokens), limit, param=prompt_param(generation))
            is_plain = await self._is_plain_answer(generation)
            if not is_plain:
                self._control.check_at_once(tokens, generation)
            whole = packed(tokens)
            prompt.num_shared = self._num_shared(whole, await self._head(generation))
            prompt.tokens, prompt.packed, prompt.goes_as_tokens = tokens, whole, is_plain and bool(tokens)
        except (Refused, OverflowError) as error:
            log.debug("a prompt is not known before it is read: %s", error)

    async def _is_plain_answer(self, generation: Generation) -> bool:
        """Whether the engine answers the tokens of the prompt as it answers the prompt."""
        asks_more = generation.logprobs is not None or generation.schema is not None
        return generation.messages is None or (not asks_more and await self._has_plain_answers())

    async def _has_plain_answers(self) -> bool:
        if self._is_plain is None:
            try:
                self._is_plain = not _NOT_PLAIN.search(await self._control.template())
            except Refused as error:
                log.debug("the template of chats is not known: %s", error)  # it is asked for again
        return bool(self._is_plain)

    async def _head(self, generation: Generation) -> bytes:
        """The prompt that these messages of the system begin, packed; nothing where they are few."""
        head = []
        for message in generation.messages or ():
            if message["role"] not in ("system", "developer"):
                break
            head.append(message)
        text = orjson.dumps(head)
        if len(text) < MIN_SHARED_TOKENS:
            return b""
        if text not in self._heads:
            asked = Generation(max_tokens=0, messages=[*head, {"role": "user", "content": ""}])
            self._heads[text] = packed(await self._control.tokens(asked))
            if len(self._heads) > NUM_HEADS:
                self._heads.popitem(last=False)
        self._heads.move_to_end(text)
        return self._heads[text]

    def _num_shared(self, prompt: bytes, head: bytes) -> int:
        num_shared = num_common(prompt, head)
        for recent in self._recent:
            common = num_common(prompt, recent)
            # What only goes on where another prompt ended is the next turn of its conversation, for nobody else.
            branches = common * TOKEN_BYTES < len(recent) or recent == prompt
            if branches and common >= num_shared + MIN_SHARED_TOKENS:
                num_shared = common
        if prompt not in self._recent:
            self._recent.append(prompt)
        num_shared = min(num_shared, len(prompt) // TOKEN_BYTES - 1)
        return num_shared if num_shared >= MIN_SHARED_TOKENS else 0

    async def _until_others_have_read(self, prompt: Prompt) -> None:
        while others := [each for prefix, each in self._being_read.items() if prompt.packed.startswith(prefix)]:
            self._burst.end(prompt)
            await others[0].wait()

    def _take_slot(self, prompt: Prompt) -> str | None:
        """Returns the name of the saved beginning that the slot should have first, if there is one."""
        num_saved, saved = self._prefixes.longest(prompt.packed)
        prompt.slot, prompt.num_held = self._slots.take(prompt.packed, num_saved)
        if saved is None or prompt.num_held >= num_saved:
            return None
        prompt.num_held = num_saved
        return saved

    def _num_saved(self, prompt: Prompt) -> int:
        return prompt.num_shared if prompt.num_shared and self._prefixes.has(prompt.shared) else 0

    async def _read(self, prompt: Prompt, saved: str | None) -> None:
        """All but the last piece, which is left to the request itself."""
        is_to_save = (
            prompt.num_held <= prompt.num_shared > 0
            and self._prefixes.has_room(prompt.shared)
            and not self._num_saved(prompt)
        )
        if is_to_save:
            read = self._being_read[prompt.shared] = asyncio.Event()
            try:
                await self._restore(prompt, saved)
                await self._read_most(prompt, prompt.num_held, prompt.num_shared)
                await self._read_to(prompt, prompt.num_shared)
                await self._save(prompt)
            finally:
                del self._being_read[prompt.shared]
                read.set()
        else:
            await self._restore(prompt, saved)
        await self._read_most(prompt, max(prompt.num_held, prompt.num_read), len(prompt.tokens))

    async def _read_most(self, prompt: Prompt, start: int, end: int) -> None:
        """In pieces, but for the last one. What is no more than a large piece is read at once, unless somebody's
        answer is on its way."""
        is_long = end - start > PIECE_TOKENS
        while end - start > (size := self._piece_tokens(is_long)):
            start += size
            await self._read_to(prompt, start)

    def _piece_tokens(self, is_long: bool) -> int:
        is_beside = self._num_answering > 0 or (is_long and self._slots.num_taken > 1)
        return PIECE_TOKENS_BESIDE if is_beside else PIECE_TOKENS

    async def _read_to(self, prompt: Prompt, end: int) -> None:
        self._burst.end(prompt)
        piece = Generation(max_tokens=0, tokens=prompt.tokens[:end], temperature=0.0, slot=prompt.slot)
        async with aclosing(self._http.generate(piece, prompt.read)) as batches:
            async for batch in batches:
                if isinstance(batch[-1], Finished):
                    prompt.read(batch[-1:])

    async def _save(self, prompt: Prompt) -> None:
        task = asyncio.create_task(self._saved(prompt.slot, prompt.shared))
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)
        await asyncio.shield(task)  # others may want it also when we are left

    async def _saved(self, slot: int, prefix: bytes) -> None:
        unfinished = self._prefixes.unfinished()
        try:
            await self._control.save(slot, unfinished)
        except Refused as error:
            self._prefixes.failed(str(error), unfinished)
        else:
            self._prefixes.keep(unfinished, prefix)
            # Nobody waits for the disk: others may have it before.
            safe = asyncio.ensure_future(asyncio.to_thread(self._prefixes.make_safe, prefix))
            self._settling.add(safe)
            safe.add_done_callback(self._settling.discard)

    async def _restore(self, prompt: Prompt, saved: str | None) -> None:
        if saved is None:
            return
        try:
            self._prefixes.use(saved)
            await self._control.restore(prompt.slot, saved)
        except (Refused, OSError) as error:
            prompt.num_held = 0
            self._prefixes.drop(saved)
            log.warning("a saved prompt could not be used, and is read again: %s", error)


def _told(on_left: OnLeft, prompt: Prompt, events: Sequence[Event]) -> None:
    on_left(prompt.counted(events))
