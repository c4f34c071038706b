"""`octoai serve`: the service in the foreground, from its first line to its last.

Makes the database ready, listens, and has the service run in this process, or in several that are supervised. Knows
nothing of requests.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from octoai import _credentials
from octoai._credentials import Credentials
from octoai.errors import ConfigurationError
from octoai.server import accounts, app, logs, serving, tokens
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.llama.options import LlamaOptions
from octoai.server.errors import Refusal
from octoai.server.http import listener
from octoai.server.http.listener import CannotListen
from octoai.server.logs import without_password
from octoai.server.machine import zombies
from octoai.server.machine.idle import Chore
from octoai.server.router import Router
from octoai.server.serving import CannotServe, Stop
from octoai.server.settings import Settings
from octoai.server.store import Connection
from octoai.server.workers.supervisor import Supervisor

__all__ = ["CannotListen", "CannotServe", "Search", "say", "serve"]

log = logging.getLogger("octoai.run")

BOOTSTRAP_NAME = "bootstrap"
_LOOPBACK = re.compile(r"http://(127\.[\d.]+|localhost|\[::1\]):")
_ANSWER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Search:
    """A command that finds out how to run a model best, and where what it found is: the file of weights, and how to
    run them; None where that is nothing."""

    model: str
    command: Sequence[str]
    found: Callable[[], tuple[Path, LlamaOptions] | None]


def serve(
    settings: Settings,
    weights: Mapping[str, Path],
    tuned: Mapping[str, LlamaOptions] | None = None,
    searches: Sequence[Search] = (),
) -> int:
    """Returns the exit status. `weights` are the files of the models that engines of ours serve, `tuned` how to run
    them where that is known, `searches` find it out while nobody asks anything."""
    router = app.router(settings, app.catalogue(settings), weights, tuned)
    if settings.workers == 1:
        chores = [Chore(search.command, partial(_use, search, settings, router)) for search in searches]
        _serve_alone(settings, router, chores)
    else:
        _serve_in_workers(settings, router)
    return 0


def say(line: str) -> None:
    """To the person who started the service, who may have gone, or read no more: it goes on as it would with them."""
    if sys.stdout is None:
        return
    try:
        logs.say(line, sys.stdout)
    except OSError:
        sys.stdout = None  # the next line would fail, or be waited for, as well


def _say_ready(url: str) -> None:
    """In the loop, where somebody is served already: they are not to wait for who may not read it."""
    asyncio.get_running_loop().run_in_executor(None, say, f"octoai ready on {url}")


async def _use(search: Search, settings: Settings, router: Router) -> None:
    """From the next moment on in which nobody is served."""
    found = await _found(search)
    chosen = next(each for each in settings.models if each.id == search.model)
    deployment = next(each for each in router.deployments if each.model.id == search.model)
    if found is None or not isinstance(deployment.engine, LlamaEngine):
        return
    engine = deployment.engine
    if not engine.files.is_there(engine.weights):
        other = f"{engine.weights} may be another file than the one that was loaded"
        log.warning("%s: %s: what was found while idle is used from the next start on", search.model, other)
        return
    weights, tuned = found
    try:
        await engine.change(weights, app.options(settings, chosen, deployment.model, weights, tuned))
    except Refusal as refusal:
        log.error("%s: what was found while idle is not used: %s", search.model, refusal.message)
    deployment.queue.resize(engine.num_slots)


async def _found(search: Search) -> tuple[Path, LlamaOptions] | None:
    """In a thread that ends with us. It hashes files, which may be large: an executor's thread would be waited for."""
    done: concurrent.futures.Future[tuple[Path, LlamaOptions] | None] = concurrent.futures.Future()

    def run() -> None:
        done.set_running_or_notify_cancel()
        try:
            done.set_result(search.found())
        except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(done)


def _serve_alone(settings: Settings, router: Router, chores: Sequence[Chore]) -> None:
    with closing(serving.database(settings)) as db:
        listening = listener.listen(settings.host, settings.port)
        url = listener.url(settings.host, listening)
        service = app.service(settings, router)
        _begin(db, settings, router, url)

    async def main() -> None:
        reaping = asyncio.create_task(zombies.reap()) if os.getpid() == 1 else None
        await serving.serve(service, listening, _signalled(), partial(_say_ready, url), chores)
        if reaping is not None:
            reaping.cancel()

    with serving.runner() as runner, listening:
        runner.run(main())


def _serve_in_workers(settings: Settings, router: Router) -> None:
    with closing(serving.database(settings)) as db:
        port = listener.Port(settings.host, settings.port)
        url = listener.url(settings.host, port.held)
        _begin(db, settings, router, url)

    async def main() -> None:
        await Supervisor(settings, port, _signalled()).run(partial(_say_ready, url))

    with closing(port):
        asyncio.run(main())


def _signalled() -> Stop:
    """Asked for by each signal that comes to this process."""
    stop, loop = Stop(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.ask)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` has it ignored
        # Both its shell and the system tell us of one terminal that closes: that is not asking twice.
        loop.add_signal_handler(signal.SIGHUP, stop.drain.set)
    return stop


def _begin(db: Connection, settings: Settings, router: Router, url: str) -> None:
    """What is done and said once, before anybody is served."""
    _bootstrap(db, url)
    if settings.ledger == "off":
        say("octoai: the ledger is off: nothing is recorded, billed or limited")
    for line in _stand_in_lines(router):
        say(line)


def _bootstrap(db: Connection, url: str) -> None:
    """On the very first start: a token, printed once, and left where `OctoAI()` on this machine finds it."""
    stored = _credentials.read()
    with db.transaction():
        accounts.ensure_default(db)
        minted = tokens.mint(db, BOOTSTRAP_NAME, scopes=tokens.SCOPES) if tokens.is_empty(db) else None
        if minted is not None:
            # Before it is kept: one that reached nobody would be lost, and the next start would make no other.
            _leave(minted.text, url, stored)
    if minted is None and stored and stored.token and _is_old(stored, url) and tokens.is_valid(db, stored.token):
        _renew(stored, url)


def _renew(stored: Credentials, url: str) -> None:
    """Store our address in place of the old one, unless a service beside us is still reached at that."""
    other = _credentials.origin(stored.endpoint)
    try:
        # Of our own port it is another spelling, and nobody would answer yet.
        if other.rpartition(":")[2] != url.rpartition(":")[2] and _is_served(other):
            kept = f"{_credentials.path()} stays as it is, for the service at {without_password(stored.endpoint)}"
            say(f"octoai: {kept}, which runs; to use this one set OCTOAI_BASE_URL={url}")
        else:
            _credentials.write(endpoint=url, token=stored.token or "")
    except ConfigurationError as error:
        say(f"octoai: {error}; until then set OCTOAI_BASE_URL={url}")


def _is_old(stored: Credentials, url: str) -> bool:
    """Whether it was our address, and is another now. One that is not of this machine's loopback is the operator's
    own: that of a proxy before us, for one."""
    is_ours = _LOOPBACK.match(_credentials.origin(stored.endpoint)) is not None
    return is_ours and stored.endpoint != url


def _is_served(origin: str) -> bool:
    """By a service as we are: another program may have the port by now."""
    try:
        with closing(http.client.HTTPConnection(origin.partition("://")[2], timeout=_ANSWER_SECONDS)) as connection:
            connection.request("GET", "/health/live")
            return connection.getresponse().read(100) == b'{"status":"ok"}'
    except TimeoutError:  # it listens, and is busy or still starting
        return True
    except (OSError, OverflowError, ValueError, http.client.HTTPException):  # of what is no port, or no name, too
        return False


def _leave(token: str, url: str, stored: Credentials | None) -> None:
    """Print the first token, and store it, unless `stored` is for another service. Raises CannotServe where it could
    be neither printed nor stored."""
    shown = f"octoai: your API token, shown once: {token}"
    if stored is None or _credentials.origin(stored.endpoint) == _credentials.origin(url):
        try:
            say(f"{shown}\noctoai: endpoint and token are in {_credentials.write(endpoint=url, token=token)}")
            return
        except ConfigurationError as error:
            other = str(error)
    else:
        other = f"{_credentials.path()} stays as it is, for {without_password(stored.endpoint)}"
    say(f"{shown}\noctoai: {other}; to use this service set OCTOAI_BASE_URL={url} and OCTOAI_TOKEN")
    if sys.stdout is None:  # nobody was told
        raise CannotServe(f"the first API token cannot be printed, and is stored nowhere: {other}")


def _stand_in_lines(router: Router) -> Iterator[str]:
    stand_in = router.stand_in
    if stand_in is None:
        return
    ids = [model.id for model, deployment in router.served() if model.id != deployment.model.id]
    if ids:
        shown = ", ".join(ids[:3])
        yield f"octoai: {stand_in.model.id} stands in for {len(ids)} models without weights here ({shown}, …)"
