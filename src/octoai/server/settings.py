"""What the operator decided: `octoai.toml`, `OCTOAI_*` variables and the command line, read once and frozen.

The command line wins over the environment, the environment over the file, the file over the defaults. Every key is
typed; what is wrong is said in one line that names the key.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from octoai.server.catalogue import EMBEDDED_MODEL_ID, BadCatalogue, Catalogue, Model, id_after, parse_model
from octoai.server.machine import places
from octoai.server.machine.places import expanded
from octoai.server.store import Place

FILENAME = "octoai.toml"
NUM_SLOTS_ELSEWHERE = 256  # requests at once to a server that nobody said more of
# Which keys an environment variable may set: OCTOAI_HOST, OCTOAI_PORT, …
_FROM_ENVIRONMENT = (
    "host", "port", "allowed_origin", "drain_seconds", "engine_stall_seconds", "max_waiting", "max_waiting_tokens",
    "prefix_cache_mib", "stand_in", "log_level", "database", "database_away_seconds", "when_database_is_away", "ledger",
    "answers_kept_seconds", "optimize_when_idle", "workers", "worker_stall_seconds",
)  # fmt: skip
_PLACES = {"data_dir": places.data_dir, "cache_dir": places.cache_dir}  # "~" and relative ones as everywhere else
_EXPECTED = {  # of those that may hold a password, so that it is not said, and where a pattern says nothing to people
    "allowed_origin": "* or an origin, in small letters and without a path, as https://chat.example",
    "database": "postgresql://user@host/name",
    "engine_url": "http://host:port/v1 or unix:/path/to/socket",
}
_FOR_CATALOGUE = ("aliases", "context_length", "licence", "input_price", "cached_input_price", "output_price", "sha256")


class BadSettings(ValueError):
    """The configuration cannot be used; the text is one line."""


def _parsable(url: str) -> str:
    _ = urlsplit(url).port  # raises ValueError for what is none
    return url


_Price = Annotated[str, Field(min_length=1)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _not_a_truth_value(cls, value: Any) -> Any:
        """No key is one, and pydantic would take `port = true` for 1."""
        if isinstance(value, bool):
            raise ValueError("no key here is true or false")
        return value


class ModelSettings(_Checked):
    """One `[[models]]` table: a model to serve.

    Without `engine_url` llama.cpp serves it here, from `path` (a GGUF), from `source`, or from the catalogue's own
    source. With it another server does: `http://host:port/v1` or `unix:/path/to/socket`.
    """

    id: Annotated[str, Field(min_length=1, max_length=128)]
    aliases: list[str] = []
    engine_url: Annotated[str, Field(pattern=r"^(https?://[^/\s]+|unix:/)"), AfterValidator(_parsable)] | None = None
    upstream_model: str | None = None
    engine_key_env: str | None = None
    dialect: Literal["llama.cpp", "ollama", "openai", "vllm"] | None = None
    path: Path | None = None
    source: dict[str, Any] | None = None
    sha256: str | None = None
    context_length: Annotated[int, Field(ge=16)] | None = None
    num_slots: Annotated[int, Field(ge=1, le=4096)] | None = None
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    licence: str | None = None
    input_price: _Price | None = None
    cached_input_price: _Price | None = None
    output_price: _Price | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSettings:
        if self.engine_url and (self.path or self.source):
            raise ValueError("give engine_url, or path, or source: a model comes from one place")
        for key in ("upstream_model", "engine_key_env", "dialect"):
            if getattr(self, key) and not self.engine_url:
                raise ValueError(f"{key} says something of another server: it needs engine_url")
        return self

    def described(self, shipped: Catalogue) -> Model:
        """The model as the catalogue will know it: what is said here, over what is known of that id."""
        entry: dict[str, Any] = {"id": self.id}
        known = shipped.find(self.id)
        said = {key: getattr(self, key) for key in _FOR_CATALOGUE if getattr(self, key)}
        if self.path is not None:
            said["source"] = {"kind": "file", "path": str(self.path)}
        elif self.source is not None:
            said["source"] = self.source
        own = parse_model(entry | said, places.here())
        model = own if known is None else self._over(known, own, said)
        prices = (model.input_price_nanos, model.output_price_nanos)
        if None in prices and {*prices, model.cached_input_price_nanos} != {None}:
            raise BadSettings(f"model {self.id!r}: give input_price and output_price, both: with one it has no price")
        return model

    def _over(self, known: Model, own: Model, said: Mapping[str, Any]) -> Model:
        changes = {key: getattr(own, key) for key in _changed(said)}
        changes["aliases"] = tuple(dict.fromkeys([*known.aliases, *self.aliases]))
        if "source" in said:
            changes |= {"size_bytes": None, "sha256": self.sha256}
        return replace(known, **changes)


class Settings(_Checked):
    """`stand_in` is the id of the model that answers for the catalogue's ids without weights here; "" is none.

    `database` is a PostgreSQL URL; without one it is SQLite in `data_dir`. While it does not answer, tokens that are
    known stay good for `database_away_seconds`, unless `when_database_is_away` is "refuse". `ledger` "off" records,
    bills and limits nothing. `answers_kept_seconds` is for answers under keys. `optimize_when_idle` "on" does that to a
    model without a profile. Of `workers`, one silent for `worker_stall_seconds` is killed. `allowed_origin`: `cors`.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    data_dir: Path
    cache_dir: Path
    allowed_origin: Annotated[str | None, Field(pattern=r"^(\*|https?://[a-z0-9.:\[\]-]+)$")] = None
    drain_seconds: Annotated[float, Field(ge=0, le=86400)] = 30.0
    engine_stall_seconds: Annotated[float, Field(ge=0.5, le=86400)] = 30.0
    max_waiting: Annotated[int, Field(ge=0, le=1_000_000)] = 256
    max_waiting_tokens: Annotated[int, Field(ge=0, le=2**40)] = 1_000_000
    prefix_cache_mib: Annotated[int, Field(ge=0, le=2**30)] = 1024
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    database: Annotated[str | None, Field(pattern=r"^postgres(ql)?://", repr=False)] = None
    database_away_seconds: Annotated[float, Field(ge=0, le=86400)] = 300.0
    when_database_is_away: Literal["serve", "refuse"] = "serve"
    ledger: Literal["on", "off"] = "on"
    answers_kept_seconds: Annotated[float, Field(ge=60, le=86400)] = 86400.0
    optimize_when_idle: Literal["on", "off"] = "off"
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    worker_stall_seconds: Annotated[float, Field(ge=0.5, le=86400)] = 30.0
    stand_in: str = ""
    models: list[ModelSettings] = []

    @property
    def place(self) -> Place:
        """Where the database is. Raises BadSettings."""
        return Place(self._known("data_dir"), self.database)

    @property
    def cache(self) -> Path:
        """`cache_dir`, of which something is wanted. Raises BadSettings."""
        return self._known("cache_dir")

    def _known(self, key: str) -> Path:
        path: Path = getattr(self, key)
        if path == places.NOWHERE:
            raise BadSettings(f"this user has no home directory: set OCTOAI_{key.upper()} to the directory to use")
        return path


def load(
    *,
    path: Path | None,
    environ: Mapping[str, str] = os.environ,
    models: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """`path` is a file that must exist; None looks for octoai.toml here and in the configuration directory.

    `models` are the ids or GGUF files of the command line, `overrides` its other options, None where not given.
    """
    path = path or places.configuration(FILENAME, environ)
    name = str(path) if path else "the environment"
    values = _from_file(path) if path else {}
    if values.get("models") == [] or not isinstance(values.get("models", []), list):
        raise BadSettings(f"{name}: models: expected [[models]] tables")
    is_default = "models" not in values
    if models:
        values["models"] = [_named(model) for model in models]
    elif is_default:
        values["models"] = [{"id": EMBEDDED_MODEL_ID}]
    if is_default and isinstance(values["models"][0], dict):
        # The default configuration says so: ids of the past are served by the first model, openly.
        values.setdefault("stand_in", values["models"][0].get("id"))
    variables = {key: f"OCTOAI_{key.upper()}" for key in (*_FROM_ENVIRONMENT, *_PLACES)}
    # An empty one says nothing, except where that is a value.
    said_by = {
        key: name for key, name in variables.items() if environ.get(name) or (key == "stand_in" and name in environ)
    }
    values |= {key: _PLACES[key](environ) if key in _PLACES else environ[said_by[key]] for key in said_by}
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    given |= {key: places.known(given[key]) for key in _PLACES if key in given}
    values |= given
    said_by |= {key: f"--{key.replace('_', '-')}" for key in given}
    for key, place in _PLACES.items():
        values.setdefault(key, place(environ))
    return _canonical(_checked(values, name, said_by), name)


def _canonical(settings: Settings, name: str) -> Settings:
    """Aliases of the catalogue become ids; what refers to something is checked to have it."""
    try:
        shipped = Catalogue.load()
        models = [_resolved(model, shipped) for model in settings.models]
        shipped.with_models([model.described(shipped) for model in models])
    except BadCatalogue as error:
        raise BadSettings(f"{name}: {error}") from None
    known = {candidate.lower() for model in models for candidate in model.described(shipped).names}
    if settings.stand_in and settings.stand_in.lower() not in known:
        served = ", ".join(model.id for model in models)
        none = 'for none, stand_in = "" or an empty OCTOAI_STAND_IN'
        raise BadSettings(f"{name}: stand_in: {settings.stand_in!r} is not served; these are: {served}; {none}")
    return settings.model_copy(update={"models": models})


def _resolved(model: ModelSettings, shipped: Catalogue) -> ModelSettings:
    known = shipped.find(model.id)
    if model.engine_url or model.path or model.source:
        return model
    if known is None:
        nearest = shipped.nearest(model.id)
        hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
        raise BadSettings(f"unknown model {model.id!r}: give an id of `octoai models`, or a GGUF file{hint}")
    if known.source is None:
        raise BadSettings(
            f"no source of weights is known for {known.id!r}: give it engine_url, path or source in {FILENAME}"
        )
    return model.model_copy(update={"id": known.id})


def _named(model: str) -> dict[str, Any]:
    """A model of the command line: a file of weights, or an id."""
    path = expanded(model)
    try:
        is_file = path.is_file()
    except OSError:  # a name that is too long for one
        is_file = False
    if model.lower().endswith(".gguf") or is_file:
        if not is_file:
            raise BadSettings(f"there is no file {path}")
        return {"id": id_after(path.stem), "path": str(path.absolute())}
    return {"id": model}


def _from_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSettings(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise BadSettings(f"{path} is not valid TOML: {error}") from None
    for key in _PLACES:
        if isinstance(values.get(key), str):
            values[key] = path.parent / places.known(values[key])
    for model in values.get("models", []) if isinstance(values.get("models", []), list) else []:
        if isinstance(model, dict) and isinstance(model.get("path"), str):
            model["path"] = str((path.parent / expanded(model["path"])).absolute())
    return values


def _checked(values: Mapping[str, Any], name: str, said_by: Mapping[str, str]) -> Settings:
    """`said_by`: the variable or option that each key not of the file came from."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
    location = problem["loc"]
    place = ".".join(map(str, location)) or "file"
    if problem["type"] == "extra_forbidden":
        known = ModelSettings if location[0] == "models" else Settings
        near = difflib.get_close_matches(str(location[-1]), known.model_fields, n=1, cutoff=0.0)
        raise BadSettings(f"{name}: unknown key {place!r}; the nearest known one is {near[0]!r}")
    message = problem["msg"].removeprefix("Value error, ")
    where = said_by.get(place, f"{name}: {place}")
    if location[-1] in _EXPECTED:
        raise BadSettings(f"{where}: expected {_EXPECTED[location[-1]]}")
    # A table, or a list of them, may hold a password.
    given = "" if isinstance(problem["input"], dict | list) else f", not {problem['input']!r:.80}"
    raise BadSettings(f"{where}: {message[:1].lower()}{message[1:]}{given}")


def _changed(said: Mapping[str, Any]) -> list[str]:
    """The fields of a `Model` that these keys set."""
    names = {
        "input_price": "input_price_nanos",
        "cached_input_price": "cached_input_price_nanos",
        "output_price": "output_price_nanos",
    }
    follows = ["cached_input_price_nanos"] if "input_price" in said else []  # also where it is not said itself
    return [*(names.get(key, key) for key in said if key != "aliases"), *follows]
