"""Streams that their clients leave, and what the ledger says of each."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from urllib.request import Request as UrlRequest
from urllib.request import urlopen

from octoai.server.store import Place, connect
from tests.load.accounts import Books
from tests.load.clients import Load, Target, Told, leaving
from tests.load.sdks import leave_all
from tests.load.upstream import MODEL, Upstream, Written
from tests.running import Serve

SETTLE_SECONDS = 10.0


def target_of(service: Serve) -> Target:
    return Target(service.url, service.token, MODEL)


def left(service: Serve, *, over_sockets: int, by_sdks: int) -> list[Told]:
    """So many streams begun and left, twelve at once."""
    load = Load(target_of(service), leaving, numbers=itertools.count(), total=over_sockets)
    told = load.start().join(500)
    return told + leave_all(target_of(service), range(over_sockets, over_sockets + by_sdks))


def differences(books: Books, told: Sequence[Told], written: Mapping[int, Written]) -> list[str]:
    """Of all whose id is known, whether a byte of an answer came or not."""
    found = []
    for each in told:
        rows = books.by_request_id.get(each.request_id or f"left-{each.number}", [])
        wrote = written.get(each.number, Written())
        billed = sum(row.completion_tokens for row in rows)
        if len(rows) > 1 or billed != wrote.completion_tokens:
            found.append(f"{each.number} {each.how}: {billed} billed, {wrote.completion_tokens} written")
    return found


def settled(service: Serve, upstream: Upstream) -> tuple[Books, dict[int, Written]]:
    """The ledger, and what the engine wrote, when everything has come to its end."""
    end = time.monotonic() + SETTLE_SECONDS
    written = upstream.at_rest(SETTLE_SECONDS)
    while _num_open(service):
        assert time.monotonic() < end, "requests that are not settled"
        time.sleep(0.05)
    return Books.read(Place(service.data_dir)), written


def _num_open(service: Serve) -> int:
    time.sleep(0.2)  # for what was left to be settled
    headers = {"authorization": f"Bearer {service.token}"}
    # Who asks the service is answered when the database has what the journal has.
    with urlopen(UrlRequest(f"{service.url}/v1/admin/accounts", headers=headers), timeout=SETTLE_SECONDS) as answer:
        answer.read()
    with closing(connect(Place(service.data_dir))) as db:
        counted = db.row("SELECT COUNT(*) FROM requests WHERE status = 'open'")
    assert counted is not None
    return int(counted[0])
