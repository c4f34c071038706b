"""Where weights come from, and the store on this machine that keeps them."""

from octoai.server.sources.base import Progress, PullFailed
from octoai.server.sources.store import WeightStore

__all__ = ["Progress", "PullFailed", "WeightStore"]
