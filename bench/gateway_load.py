"""The load on the gateways that `gateway.py` measures, from a process of its own.

Reads orders from standard input, one JSON object (`Order`) a line, and answers each with one (`Seen`). Clients keep
their connections and ask again as soon as an answer is whole. Every answer is kept as it came, and checked when the
measured time is over, so that checking costs the gateway nothing.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import httptools
import orjson
import uvloop

from gateway_wire import Ask

_TOKEN = b'" w'  # begins the text of every token, however a gateway spaces its JSON
_WARM_SECONDS = 0.1
_MORE_SECONDS = 2.0  # at most, on top of an order's, until every client has had two answers on average
_END_SECONDS = 20.0  # for what is under way when the time is over


@dataclass(frozen=True)
class Order:
    """`clients` at once, for `seconds` or until there have been `requests`; they begin spread over `spread_seconds`.

    `headers` are whole lines."""

    port: int
    headers: str
    num_tokens: int
    is_stream: bool = False
    pace: int = 0
    clients: int = 1
    seconds: float = 0.0
    requests: int = 0
    spread_seconds: float = 0.0

    @property
    def ask(self) -> Ask:
        return Ask(self.num_tokens, self.is_stream, self.pace)


@dataclass
class Seen:
    """`rate`, `tokens_rate` a second; `late_ms` is behind the schedule that began when the request was sent.

    `answers` have begun, with a 200; `unanswered` had not begun and `unended` were not whole when the time was over.
    `wrong` says what was wrong with the first of `num_wrong`, `is_counted` whether all of them said the right usage.
    """

    rate: float = 0.0
    tokens_rate: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    first_p50_ms: float = 0.0
    first_p99_ms: float = 0.0
    late_p99_ms: float = 0.0
    answers: int = 0
    unanswered: int = 0
    unended: int = 0
    num_wrong: int = 0
    wrong: str = ""
    is_counted: bool = True


@dataclass
class Answer:
    sent: float
    status: int = 0
    first: float = 0.0
    ended: float = 0.0
    body: bytes = b""
    is_lost: bool = False  # the gateway hung up on it


class Run:
    """What all clients of an order have come to."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.request = order.ask.request(f"127.0.0.1:{order.port}", order.headers)
        self.answers: list[Answer] = []
        self.tokens: list[tuple[float, int]] = []
        self.lateness: list[float] = []
        self.num_whole = 0
        self.is_over = False
        self.left = order.requests

    def may_ask(self) -> bool:
        if self.order.seconds:
            return not self.is_over
        self.left -= 1
        return self.left >= 0


class Client(asyncio.Protocol):
    def __init__(self, run: Run) -> None:
        self.run, self.done = run, asyncio.get_running_loop().create_future()
        self.answer: Answer | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer is not None:
            self.answer.is_lost = True
        if not self.done.done():
            self.done.set_result(None)

    def ask(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.parts: list[bytes] = []
        self.said = 0
        self.answer = Answer(time.perf_counter())
        self.run.answers.append(self.answer)
        self.transport.write(self.run.request)

    def data_received(self, data: bytes) -> None:
        self.now = time.perf_counter()
        self.parser.feed_data(data)

    # ---- what the parser calls ----

    def on_headers_complete(self) -> None:
        self.answer.status = self.parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        self.parts.append(part)
        answer = self.answer
        if not answer.first:
            answer.first = self.now
        if not self.run.order.is_stream or not (count := part.count(_TOKEN)):
            return
        if pace := self.run.order.pace:
            self.run.lateness += [self.now - answer.sent - (self.said + each) / pace for each in range(count)]
            self.said += count
        else:
            self.run.tokens.append((self.now, count))

    def on_message_complete(self) -> None:
        answer = self.answer
        answer.ended, answer.body, self.answer = self.now, b"".join(self.parts), None
        self.run.num_whole += 1
        # Not from inside the parser, which a next answer replaces.
        asyncio.get_running_loop().call_soon(self.next)

    def next(self) -> None:
        if not self.run.may_ask():
            self.transport.close()
        elif not self.done.done():  # a gateway that hung up after its answer is not asked
            self.ask()


# ---- an order, from its connections to its figures ----


async def carried_out(order: Order) -> Seen:
    run, loop = Run(order), asyncio.get_running_loop()
    address = ("127.0.0.1", order.port)
    clients = [(await loop.create_connection(lambda: Client(run), *address))[1] for _ in range(order.clients)]
    since = time.perf_counter()
    for client in clients:
        client.next()
        if order.spread_seconds:
            await asyncio.sleep(order.spread_seconds / len(clients))
    ended = asyncio.wait([client.done for client in clients], timeout=_END_SECONDS)
    if order.seconds:
        await asyncio.sleep(_WARM_SECONDS)
        since = time.perf_counter()
        await asyncio.sleep(order.seconds)
        latest = since + order.seconds + _MORE_SECONDS
        while run.num_whole < 2 * order.clients and time.perf_counter() < latest:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        until, run.is_over = time.perf_counter(), True
        await ended
    else:
        await ended
        until = time.perf_counter()
    for client in clients:
        client.transport.abort()
    return seen(run, since, until)


def seen(run: Run, since: float, until: float) -> Seen:
    found = Seen()
    whole = [answer for answer in run.answers if answer.ended]
    inside = [answer for answer in whole if since <= answer.ended <= until] or whole
    if inside:
        found.rate = len(inside) / (until - since)
        found.p50_ms, found.p99_ms = _quantiles([answer.ended - answer.sent for answer in inside])
        found.first_p50_ms, found.first_p99_ms = _quantiles([answer.first - answer.sent for answer in inside])
    found.tokens_rate = sum(count for at, count in run.tokens if since <= at <= until) / (until - since)
    if run.lateness:
        found.late_p99_ms = _quantiles(run.lateness)[1]
    found.answers = sum(answer.status == 200 for answer in run.answers)
    found.unanswered = sum(answer.status == 0 for answer in run.answers)
    found.unended = len(run.answers) - len(whole)
    for answer in run.answers:
        if problem := _problem(answer, run.order, found):
            found.num_wrong += 1
            found.wrong = found.wrong or problem
    return found


def _quantiles(values: list[float]) -> tuple[float, float]:
    """The 50th and the 99th percentile, in milliseconds."""
    ordered = sorted(values)
    return statistics.median(ordered) * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3


def _problem(answer: Answer, order: Order, found: Seen) -> str:
    """What is wrong with it. A paced answer that has not ended is late, which is counted elsewhere."""
    if answer.is_lost:
        return "the gateway hung up in the middle of an answer"
    if not answer.ended:
        return "" if order.pace else f"no end after {time.perf_counter() - answer.sent:.0f} s"
    if answer.status != 200:
        return f"status {answer.status}: {answer.body[:300].decode(errors='replace')}"
    try:
        text, usage = _streamed(answer.body) if order.is_stream else _whole(orjson.loads(answer.body))
    except (ValueError, LookupError, TypeError) as error:
        return f"{error!r} in {answer.body[:300]!r}"
    found.is_counted &= _has(usage, order.ask.usage)
    return "" if text == order.ask.text else f"another text: {text[:300]!r}"


def _has(usage: Mapping[str, Any] | None, right: Mapping[str, int]) -> bool:
    return usage is not None and all(usage.get(name) == count for name, count in right.items())


def _whole(body: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    if body["choices"][0]["finish_reason"] != "stop":
        raise ValueError("not stopped")
    return body["choices"][0]["message"]["content"], body.get("usage")


def _streamed(body: bytes) -> tuple[str, dict[str, Any] | None]:
    """The text and the last usage of a stream that is whole."""
    *events, last, rest = [event for event in body.split(b"\n\n") if not event.startswith(b":")]
    if last != b"data: [DONE]" or rest:
        raise ValueError("not ended by [DONE]")
    chunks = [orjson.loads(event.removeprefix(b"data: ")) for event in events]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    if [choice["finish_reason"] for choice in choices if choice.get("finish_reason")] != ["stop"]:
        raise ValueError("not stopped once")
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    return "".join(choice["delta"].get("content") or "" for choice in choices), usages[-1] if usages else None


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asdict(uvloop.run(carried_out(Order(**json.loads(line)))))), flush=True)


if __name__ == "__main__":
    main()
