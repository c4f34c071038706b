"""The composition root: builds the service from the settings, and lists the routes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from starlette.routing import BaseRoute, Route
from starlette.routing import Router as Routes

from octoai.server.admission import Admission
from octoai.server.api import admin, cors, docs, organization, pricing, text_gen
from octoai.server.api.edge import Edge
from octoai.server.billing import prices
from octoai.server.catalogue import Catalogue, Model
from octoai.server.directory import Directory
from octoai.server.engines.base import Engine
from octoai.server.engines.llama.cache_size import num_slots, slots_that_fit
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.llama.options import LlamaOptions
from octoai.server.ledger.books import Books, open_journal, recover
from octoai.server.ledger.ledger import Ledger
from octoai.server.metrics.families import Metrics
from octoai.server.queue import FairQueue
from octoai.server.router import Deployment, Router
from octoai.server.service import Service
from octoai.server.settings import NUM_SLOTS_ELSEWHERE, BadSettings, ModelSettings, Settings
from octoai.server.store import Connection, clocks, connect
from octoai.server.store.reader import Reader
from octoai.server.times import now_us

log = logging.getLogger("octoai.app")

DEFAULT_CONTEXT_LENGTH = 8192

# Clients that were given a whole URL where a base was meant append their path to it once more.
_CHAT_PATHS = ("/v1/chat/completions", "/v1/chat/completions/chat/completions", "/chat/completions")
_COMPLETION_PATHS = ("/v1/completions", "/v1/completions/completions", "/completions")


def routes() -> list[BaseRoute]:
    return [
        # What is posted to these does not come this way; of other methods it is said what would be right.
        *(Route(path, text_gen.posted, methods=["POST"]) for path in (*_CHAT_PATHS, *_COMPLETION_PATHS)),
        Route("/v1/models", text_gen.models, methods=["GET"]),
        Route("/v1/models/{model:path}", text_gen.model, methods=["GET"]),
        Route("/v1/pricing", pricing.pricing, methods=["GET"]),
        *organization.routes(),
        *admin.routes(),
        Route("/health/live", text_gen.live, methods=["GET"]),
        *(Route(path, text_gen.ready, methods=["GET"]) for path in ("/health/ready", "/health")),  # vLLM's name for it
        Route("/metrics", text_gen.metrics, methods=["GET"]),
        Route("/openapi.json", docs.openapi, methods=["GET"]),
        Route("/docs", docs.page, methods=["GET"]),
        Route("/", docs.page, methods=["GET"]),
    ]


def edge(service: Service) -> Edge:
    posts = {
        **dict.fromkeys(_CHAT_PATHS, text_gen.chat_completions),
        **dict.fromkeys(_COMPLETION_PATHS, text_gen.completions),
    }
    inner = Routes(routes=routes(), redirect_slashes=False)
    return Edge(inner if service.allowed_origin is None else cors.Preflights(inner), service, posts)


def prepare(settings: Settings) -> Connection:
    """The database, up to date: migrated, with what an earlier process left in its journal, and today's prices.

    Raises StoreError; StoreAway where it may be there later.
    """
    db = connect(settings.place)
    left = recover(settings.place)
    if left:
        log.warning("%d requests of a process that ended without a word are settled by their checkpoints", left)
    with db.transaction():
        prices.sync(db, catalogue(settings), now_us())
    if line := clocks.ahead(db, now_us()):
        log.warning("%s", line)
    return db


def router(
    settings: Settings,
    catalogue: Catalogue,
    weights: Mapping[str, Path],
    tuned: Mapping[str, LlamaOptions] | None = None,
) -> Router:
    """The models and what generates for them, nothing started yet.

    `weights` has the file of every model that an engine of ours serves, by the model's id, `tuned` how to run those
    that are known to run best in some way; what the settings say of a model goes before that.
    """
    deployments = [
        Deployment(
            catalogue[model.id], engine, FairQueue(engine.num_slots, settings.max_waiting, settings.max_waiting_tokens)
        )
        for model in settings.models
        for engine in [
            _engine(model, catalogue[model.id], weights.get(model.id), (tuned or {}).get(model.id), settings)
        ]
    ]
    return Router(deployments, catalogue, stand_in=_stand_in(deployments, settings))


def service(settings: Settings, router: Router) -> Service:
    """As `octoai serve` runs it."""
    metrics = Metrics()
    metrics.watch(router.deployments)
    return over(settings, router, metrics, is_beside=True)


def over(settings: Settings, router: Router, metrics: Metrics, *, is_beside: bool = False) -> Service:
    """A service over deployments that are there already. `is_beside`: the database is written to by a process of its
    own, where there may be one."""
    journal = None if settings.ledger == "off" else open_journal(settings.place)
    keep_seconds = settings.answers_kept_seconds
    books = Books(settings.place, journal, is_beside=is_beside, keep_seconds=keep_seconds)
    away_seconds = settings.database_away_seconds if settings.when_database_is_away == "serve" else 0.0
    # A thread of its own: no report, however long it takes, may make tokens look stale.
    directory = Directory(Reader(settings.place, num_threads=1), away_seconds=away_seconds)
    ledger = Ledger(
        journal,
        books.writer,
        away_seconds=away_seconds,
        num_processes=settings.workers,
    )
    metrics.watch_books(ledger, directory)
    return Service(
        directory=directory,
        admission=Admission(ledger, books, directory.price, keep_seconds=keep_seconds),
        router=router,
        metrics=metrics,
        drain_seconds=settings.drain_seconds,
        allowed_origin=settings.allowed_origin,
    )


def _stand_in(deployments: Sequence[Deployment], settings: Settings) -> Deployment | None:
    wanted = (settings.stand_in or "").lower()
    return next((each for each in deployments if wanted in map(str.lower, each.model.names)), None)


def catalogue(settings: Settings) -> Catalogue:
    """The catalogue with the configuration's models in it."""
    shipped = Catalogue.load()
    return shipped.with_models([model.described(shipped) for model in settings.models])


def _engine_key(chosen: ModelSettings) -> str | None:
    """Looked up when the service starts: other commands read the same file where the variable is not set."""
    if chosen.engine_key_env is None:
        return None
    key = os.environ.get(chosen.engine_key_env, "").strip()  # a secret that is a file ends with a line break
    where = f"model {chosen.id!r}: engine_key_env: {chosen.engine_key_env}"
    if not key:
        raise BadSettings(f"{where} is not set in the environment")
    if not (key.isascii() and key.isprintable()):
        raise BadSettings(f"{where} holds more than a key: expected visible ASCII characters on one line")
    return key


def _engine(
    chosen: ModelSettings, model: Model, weights: Path | None, tuned: LlamaOptions | None, settings: Settings
) -> Engine:
    if chosen.engine_url is not None:
        from octoai.server.engines.openai.engine import OpenAIEngine

        return OpenAIEngine(
            chosen.engine_url,
            model=chosen.upstream_model or chosen.id,
            dialect=chosen.dialect or "openai",
            key=_engine_key(chosen),
            num_slots=chosen.num_slots or NUM_SLOTS_ELSEWHERE,
            context_length=chosen.context_length,
        )
    assert weights is not None
    return LlamaEngine(weights, model=model.id, options=options(settings, chosen, model, weights, tuned))


def options(
    settings: Settings, chosen: ModelSettings, model: Model, weights: Path, tuned: LlamaOptions | None
) -> LlamaOptions:
    """How an engine of ours runs that model: what the settings say goes before what was found to be best."""
    context_length = chosen.context_length or model.context_length or DEFAULT_CONTEXT_LENGTH
    base = tuned or LlamaOptions(context_length, num_slots=num_slots(weights, context_length))
    num_threads = chosen.num_threads or base.num_threads
    tuning = base.tuning
    if chosen.num_threads:  # of threads that read prompts too; 0 stays "as many as generate"
        tuning = replace(tuning, num_batch_threads=min(tuning.num_batch_threads, num_threads))
    num_fitting = slots_that_fit(weights, context_length, base.num_slots, tuning.cache_type)
    return replace(
        base,
        context_length=context_length,
        num_slots=chosen.num_slots or num_fitting,
        num_threads=num_threads,
        tuning=tuning,
        stall_seconds=settings.engine_stall_seconds,
        prefix_dir=settings.cache / "prefixes",
        prefix_bytes=settings.prefix_cache_mib * 2**20,
    )
