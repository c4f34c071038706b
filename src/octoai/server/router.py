"""Which deployment answers for a model's id: its own weights, or, where the configuration says so, a stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from octoai.server.catalogue import LONGEST_COMPARED, Catalogue, Model, nearest
from octoai.server.engines.base import Engine
from octoai.server.errors import UnknownModel
from octoai.server.queue import FairQueue

MAX_KEPT = 256  # names and lists of names that are not looked up again


@dataclass(frozen=True, slots=True, eq=False)
class Deployment:
    """A model that is being served: what is known of it, what generates, and who waits for it."""

    model: Model
    engine: Engine
    queue: FairQueue

    @property
    def context_length(self) -> int | None:
        """The served window in tokens: what the engine has, not what the model could. None: the engine does not say."""
        return self.engine.context_length or self.model.context_length


@dataclass(frozen=True, slots=True)
class Router:
    """`stand_in` answers for the catalogue's models that have no weights here; None: nothing does. `ids` are those of
    the models that some names mean; a name that is not known here stands for itself."""

    deployments: Sequence[Deployment]
    catalogue: Catalogue
    stand_in: Deployment | None = None
    ids: Callable[[tuple[str, ...]], frozenset[str]] = field(init=False, repr=False, compare=False)
    _by_name: Mapping[str, Deployment] = field(init=False)
    _nearest: Callable[[str, tuple[str, ...] | None], tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = {name.lower(): deployment for deployment in self.deployments for name in deployment.model.names}
        object.__setattr__(self, "_by_name", names)
        object.__setattr__(self, "_nearest", lru_cache(MAX_KEPT)(self._nearest_of))
        object.__setattr__(self, "ids", lru_cache(MAX_KEPT)(self._ids))

    def find(self, name: str, models: tuple[str, ...] | None = None) -> Deployment:
        """Raises UnknownModel, naming the closest ids that would have worked: of these models; None: of all."""
        own = self._by_name.get(name.lower())
        if own is not None:
            return own
        known = self.catalogue.find(name)
        if known is not None and known.id.lower() in self._by_name:
            return self._by_name[known.id.lower()]
        if known is not None and known.kind != "embedding" and self.stand_in is not None:
            return self.stand_in
        raise UnknownModel(name, self._nearest(name[:LONGEST_COMPARED], models))

    def named(self, name: str) -> Model:
        """The model that a request names: what it is billed as, whichever answers. Raises UnknownModel."""
        return self._known(name) or self.find(name).model

    def _known(self, name: str) -> Model | None:
        own = self._by_name.get(name.lower())
        return self.catalogue.find(name) if own is None else own.model

    def _nearest_of(self, name: str, models: tuple[str, ...] | None) -> tuple[str, ...]:
        ids = None if models is None else self.ids(models)
        return nearest(name, [model for model, _ in self.served() if ids is None or model.id in ids])

    def _ids(self, names: tuple[str, ...]) -> frozenset[str]:
        return frozenset(name if (model := self._known(name)) is None else model.id for name in names)

    def served(self) -> Iterable[tuple[Model, Deployment]]:
        """Every id that a request may name, with what answers for it."""
        for deployment in self.deployments:
            yield deployment.model, deployment
        if self.stand_in is not None:
            for model in self.catalogue.values():
                if model.kind != "embedding" and model.id.lower() not in self._by_name:
                    yield model, self.stand_in
