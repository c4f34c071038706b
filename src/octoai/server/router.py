"""Which deployment answers for a model's id: its own weights, or, where the configuration says so, a stand-in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from octoai.server.catalogue import Catalogue, Model, nearest
from octoai.server.engines.base import Engine
from octoai.server.errors import UnknownModel
from octoai.server.queue import FairQueue


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
    """`stand_in` answers for the catalogue's models that have no weights here; None: nothing does."""

    deployments: Sequence[Deployment]
    catalogue: Catalogue
    stand_in: Deployment | None = None
    _by_name: Mapping[str, Deployment] = field(init=False)

    def __post_init__(self) -> None:
        names = {name.lower(): deployment for deployment in self.deployments for name in deployment.model.names}
        object.__setattr__(self, "_by_name", names)

    def find(self, name: str) -> Deployment:
        """Raises UnknownModel, naming the closest ids that would have worked."""
        own = self._by_name.get(name.lower())
        if own is not None:
            return own
        known = self.catalogue.find(name)
        if known is not None and known.id.lower() in self._by_name:
            return self._by_name[known.id.lower()]
        if known is not None and known.kind != "embedding" and self.stand_in is not None:
            return self.stand_in
        raise UnknownModel(name, nearest(name, (model for model, _ in self.served())))

    def is_known(self, name: str) -> bool:
        return name.lower() in self._by_name or self.catalogue.find(name) is not None

    def named(self, name: str) -> Model:
        """The model that a request names: what it is billed as, whichever answers. Raises UnknownModel."""
        own = self._by_name.get(name.lower())
        if own is not None:
            return own.model
        return self.catalogue.find(name) or self.find(name).model

    def served(self) -> Iterable[tuple[Model, Deployment]]:
        """Every id that a request may name, with what answers for it."""
        for deployment in self.deployments:
            yield deployment.model, deployment
        if self.stand_in is not None:
            for model in self.catalogue.values():
                if model.kind != "embedding" and model.id.lower() not in self._by_name:
                    yield model, self.stand_in
