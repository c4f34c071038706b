"""The description of the API, at `/openapi.json` and `/docs`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from octoai.server.api import docs
from tests.running import InProcess
from tests.talking import ask


def references(node: Any) -> Iterator[str]:
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from references(value)
    if isinstance(node, dict) and isinstance(node.get("$ref"), str):
        yield node["$ref"]


def test_the_description_is_openapi_and_whole(service: InProcess) -> None:
    spec = json.loads(ask(service, "/openapi.json", authorization="")[2])
    assert spec["openapi"].startswith("3.1")
    assert {"title", "version"} <= spec["info"].keys()
    for reference in references(spec):
        node = spec
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
    for path, item in spec["paths"].items():
        for method, operation in item.items():
            assert method in {"get", "post", "patch", "delete"}
            assert operation["responses"]
            assert all(answer["description"] for answer in operation["responses"].values())
            named = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        schema = spec["components"]["schemas"][name]
        assert "model" in schema["required"]
        assert {"temperature", "stream", "stop", "n"} <= schema["properties"].keys()
    assert b"<h1>" in ask(service, "/docs")[2]


def test_the_description_is_put_together_once(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for no token, and took 3 ms, in which nothing else went on."""
    paths = ("/docs", "/openapi.json")
    first = [ask(service, path)[2] for path in paths]
    monkeypatch.setattr(docs, "document", None)
    assert [ask(service, path)[2] for path in paths] == first
