"""`/openapi.json`, made from the types that check requests, and a page to read it by."""

from __future__ import annotations

import html
from collections.abc import Mapping
from functools import cache
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from octoai.server.api import admin, organization, pricing
from octoai.server.params.generations import ChatBody, CompletionBody
from octoai.version import __version__
from octoai.wire import answers

_REF = "#/components/schemas/{model}"
_ANSWERS: tuple[type[BaseModel], ...] = (
    answers.ChatCompletionResponse,
    answers.ChatCompletionChunk,
    answers.CompletionResponse,
    answers.ErrorResponse,
    answers.HttpValidationError,
)
_REFUSALS = {
    "400": "Malformed JSON, a parameter that the model's engine cannot honour, a well-known one that would change the "
    "answer and is not offered here (`functions`, `guided_json`, `web_search_options`, …; other unknown keys are "
    "ignored), or a prompt longer than the context",
    "401": "No API token, or not a valid one",
    "402": "`insufficient_quota`: the credit or a hard budget is used up",
    "403": "The token lacks the scope `inference`, or may not use the model",
    "404": "`model_not_found`, naming the closest ids",
    "409": "The `Idempotency-Key` was used for another request",
    "413": "A body over 10 MB",
    "415": "A `Content-Encoding`: bodies are read as they come",
    "422": "A field that is missing, of the wrong type or out of range; `detail` names each, of a list the first value "
    "that is wrong. Or more values than are read: two million, of them 131,072 texts, lists and objects",
    "429": "`rate_limit_exceeded`; `retry-after` says when this very request would be let through, where that is ever: "
    "one that alone is more than the limit has none",
    "502": "The engine broke off",
    "503": "Draining, overloaded, or the engine is starting; `retry-after` says when to come back",
}


async def openapi(_: Request) -> Response:
    return Response(_json(), media_type="application/json")


async def page(_: Request) -> Response:
    policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return HTMLResponse(_page(), headers=policy)


@cache
def document() -> dict[str, Any]:
    _, shared = models_json_schema([(model, "serialization") for model in _ANSWERS], ref_template=_REF)
    schemas: dict[str, Any] = dict(shared["$defs"])
    for name, body in (("ChatCompletionRequest", ChatBody), ("CompletionRequest", CompletionBody)):
        schema = TypeAdapter(body).json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[name] = schema
    schemas |= admin.schemas()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "octoai",
            "version": __version__,
            "description": "Text generation, compatible with OctoAI's API and with OpenAI's clients; accounts, prices "
            "and usage. Money is USD as a decimal string (`usage.cost`: a number), times are whole seconds since 1970 "
            "(UTC).",
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "`octoai token create`"}},
        },
        "security": [{"token": []}],
        "paths": _paths(),
    }


def _paths() -> dict[str, Any]:
    chat = "A chat completion, whole or, with `stream: true`, as server-sent events that end with `data: [DONE]`."
    text = "Continue a prompt as it is: no chat template is applied."
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    measured = "Prometheus metrics, under vLLM's names and our own; what each token used for the scope `admin` alone."
    open_to_all: dict[str, Any] = {"security": []}
    return {
        "/v1/chat/completions": {
            "post": _generation(chat, "ChatCompletionRequest", "ChatCompletionResponse", "ChatCompletionChunk")
        },
        "/v1/completions": {"post": _generation(text, "CompletionRequest", "CompletionResponse", "CompletionResponse")},
        "/v1/models": {"get": _reading("Every id a request may name, with what serves it, its window and its price.")},
        "/v1/models/{model}": {"get": {**_reading("One of them."), "parameters": [name]}},
        **pricing.paths(),
        **organization.paths(),
        **admin.paths(),
        "/health/live": {"get": {**_reading("The process answers."), **open_to_all}},
        "/health/ready": {"get": {**_reading("A request would be served now; 503 where not, and why."), **open_to_all}},
        "/health": {"get": {**_reading("The same, where vLLM and llama-server say it."), **open_to_all}},
        "/metrics": {"get": {**_reading(measured), "security": [{}, {"token": []}]}},
    }


def _generation(summary: str, body: str, answer: str, chunk: str) -> dict[str, Any]:
    content = {"application/json": _ref(answer), "text/event-stream": _ref(chunk)}
    refusals = {
        status: {
            "description": text,
            "content": {"application/json": _ref("HttpValidationError" if status == "422" else "ErrorResponse")},
        }
        for status, text in _REFUSALS.items()
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": _ref(body)}},
        "responses": {"200": {"description": "The answer", "content": content}, **refusals},
    }


def _reading(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "As said"}}}


def _ref(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(model=name)}}


@cache
def _json() -> bytes:
    return orjson.dumps(document())


@cache
def _page() -> bytes:
    spec, rows = document(), []
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            rows.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{_text(operation['summary'])}</p>"
            )
            body = operation.get("requestBody")
            if body:
                name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
                rows.append(_parameters(spec["components"]["schemas"][name]))
            told = [
                f"<li><b>{code}</b> {_text(each['description'])}</li>" for code, each in operation["responses"].items()
            ]
            rows.append(f"<ul>{''.join(told)}</ul>")
    info = spec["info"]
    return _FRAME.format(title=info["title"], version=info["version"], body="\n".join(rows)).encode()


def _parameters(schema: Mapping[str, Any]) -> str:
    required = set(schema.get("required", ()))
    cells = [
        f"<tr><td><code>{name}</code>{' *' if name in required else ''}</td><td>{html.escape(_type(field))}</td></tr>"
        for name, field in sorted(schema["properties"].items(), key=lambda item: (item[0] not in required, item[0]))
    ]
    return f"<table><tr><th>parameter (* required)</th><th>type and range</th></tr>{''.join(cells)}</table>"


def _type(field: Mapping[str, Any]) -> str:
    """A field's type in a few words: what a person wants to know before reading the schema."""
    if "anyOf" in field:
        return " | ".join(dict.fromkeys(_type(each) for each in field["anyOf"]))
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1].strip("_")
    if "enum" in field or "const" in field:
        return ", ".join(f'"{value}"' for value in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_type(field.get('items', {}))}"
    words = {"minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]:g}" for key, sign in words.items() if key in field]
    return " ".join([kind, *([f"({field['description']})"] if "description" in field else bounds)])


def _text(markdown: str) -> str:
    parts = html.escape(markdown).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title} {version}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }}
h1 small {{ font-weight: normal; color: #667; }}
h2 {{ font-size: 1.05rem; margin-top: 2.2rem; border-top: 1px solid #dde; padding-top: 1rem; }}
code, pre {{ font: 0.92em ui-monospace, monospace; background: #f3f5f9; border-radius: 4px; padding: 0.1em 0.3em; }}
pre {{ padding: 0.8rem 1rem; overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; padding: 0.25rem 0.6rem; border-bottom: 1px solid #e6e9f0; vertical-align: top; }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #12161d; color: #dfe5ee; }} code, pre {{ background: #1e2530; }}
  td, th {{ border-color: #2a3340; }} h2 {{ border-color: #2a3340; }}
}}
</style></head><body>
<h1>{title} <small>{version}</small></h1>
<p>Text generation, compatible with OctoAI's API and with OpenAI's clients. For programs:
<a href="/openapi.json"><code>/openapi.json</code></a>.</p>
<pre>from octoai import OctoAI

client = OctoAI()  # endpoint and token from the environment or from `octoai serve` on this machine
answer = client.text_gen.create_chat_completion(
    model="smollm2-135m-instruct",
    messages=[{{"role": "user", "content": "Write a blog about Seattle"}}],
)
print(answer.choices[0].message.content)</pre>
{body}
</body></html>
"""
