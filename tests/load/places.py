"""The service over the counting engine, configured in a directory of a test's own."""

from __future__ import annotations

from pathlib import Path

from tests.load.upstream import MODEL, Upstream
from tests.running import Serve

_SETTINGS = """
{more}
[[models]]
id = "{model}"
engine_url = "{url}"
dialect = "vllm"
input_price = "0.50"
cached_input_price = "0.125"
output_price = "1.50"
"""


def serve(place: Path, upstream: Upstream, *arguments: str, settings: str = "", wait: bool = True) -> Serve:
    """`settings` are further keys of octoai.toml."""
    configured = place / "config" / "octoai.toml"
    configured.parent.mkdir(parents=True, exist_ok=True)
    configured.write_text(_SETTINGS.format(model=MODEL, url=upstream.url, more=settings))
    return Serve(place, *arguments, wait=wait)
