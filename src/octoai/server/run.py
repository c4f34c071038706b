"""`octoai serve`: the service in the foreground, from its first line to its last.

Makes the database ready, listens, and has the service run in this process, or in several that are supervised. Knows
nothing of requests.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from octoai import _credentials
from octoai.server import accounts, app, listener, serving, tokens
from octoai.server.engines.llama import LlamaOptions
from octoai.server.listener import CannotListen
from octoai.server.router import Router
from octoai.server.serving import CannotServe, Stop
from octoai.server.settings import Settings
from octoai.server.store import Connection
from octoai.server.supervisor import Supervisor

__all__ = ["CannotListen", "CannotServe", "serve"]

BOOTSTRAP_NAME = "bootstrap"


def serve(
    settings: Settings,
    weights: Mapping[str, Path],
    tuned: Mapping[str, LlamaOptions] | None = None,
    idle_commands: Sequence[Sequence[str]] = (),
) -> int:
    """Returns the exit status. `weights` are the files of the models that engines of ours serve, `tuned` how to run
    them where that is known, `idle_commands` programs to run while nobody asks anything."""
    router = app.router(settings, app.catalogue(settings), weights, tuned)
    if settings.workers == 1:
        _serve_alone(settings, router, idle_commands)
    else:
        _serve_in_workers(settings, router)
    return 0


def _serve_alone(settings: Settings, router: Router, idle_commands: Sequence[Sequence[str]]) -> None:
    with closing(serving.database(settings)) as db:
        listening = listener.listen(settings.host, settings.port)
        url = listener.url(settings.host, listening)
        service = app.service(settings, router)
        _begin(db, settings, router, url)

    async def main() -> None:
        await serving.serve(service, listening, _signalled(), lambda: _say_ready(url), idle_commands)

    with serving.runner() as runner, listening:
        runner.run(main())


def _serve_in_workers(settings: Settings, router: Router) -> None:
    with closing(serving.database(settings)) as db:
        port = listener.Port(settings.host, settings.port)
        url = listener.url(settings.host, port.held)
        _begin(db, settings, router, url)

    async def main() -> None:
        await Supervisor(settings, port, _signalled()).run(lambda: _say_ready(url))

    with closing(port):
        asyncio.run(main())


def _signalled() -> Stop:
    """Asked for by each signal that comes to this process."""
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.ask)
    return stop


def _say_ready(url: str) -> None:
    print(f"octoai ready on {url}", flush=True)


def _begin(db: Connection, settings: Settings, router: Router, url: str) -> None:
    """What is done and said once, before anybody is served."""
    _bootstrap(db, url)
    if settings.ledger == "off":
        print("octoai: the ledger is off: nothing is recorded, billed or limited", flush=True)
    for line in _stand_in_lines(router):
        print(line, flush=True)


def _bootstrap(db: Connection, url: str) -> None:
    """On the very first start: a token, printed once, and left where `OctoAI()` on this machine finds it."""
    stored = _credentials.read()
    with db.transaction():
        accounts.ensure_default(db)
        minted = tokens.mint(db, BOOTSTRAP_NAME, scopes=tokens.SCOPES) if tokens.is_empty(db) else None
    if minted is not None:
        path = _credentials.write(endpoint=url, token=minted.text)
        print(
            f"octoai: your API token, shown once: {minted.text}\noctoai: endpoint and token are in {path}", flush=True
        )
    elif stored is not None and stored.token and stored.endpoint != url and tokens.is_valid(db, stored.token):
        _credentials.write(endpoint=url, token=stored.token)


def _stand_in_lines(router: Router) -> Iterator[str]:
    stand_in = router.stand_in
    if stand_in is None:
        return
    ids = [model.id for model, deployment in router.served() if model.id != deployment.model.id]
    if ids:
        shown = ", ".join(ids[:3])
        yield f"octoai: {stand_in.model.id} stands in for {len(ids)} models without weights here ({shown}, …)"
