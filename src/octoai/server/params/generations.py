"""From a request's body to `Generation`s: checked, defaults filled in, old spellings understood.

Pure: bytes in, a `TextRequest` out, or a refusal that names the field. Types and ranges come from
`octoai.wire.params`; what old clients still send (OctoAI 0.x, parts without `type`) is put right here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Optional, Union

from pydantic import Field, GetPydanticSchema, TypeAdapter
from typing_extensions import TypedDict

from octoai.server.engines.base import Generation
from octoai.server.errors import BadRequest, UnsupportedParameter
from octoai.server.params.bodies import MAX_SHOWN_KEY, checked, invalid
from octoai.server.params.messages import continues, template_kwargs, told, without_nulls
from octoai.server.params.structure import checked_tools, schema_of
from octoai.wire.params import MAX_CHOICES, ChatParams, CompletionParams, Messages

DEFAULT_MAX_TOKENS = 512
MAX_PROMPTS = 128

# Parameters of today's clients, OpenAI's, vLLM's and llama.cpp's, that would change the answer in a way nothing here
# can do. The harmless rest (metadata, store, service_tier, prompt_cache_key, reasoning_effort, …) changes nothing.
IMPOSSIBLE = frozenset(
    {
        "allowed_token_ids",
        "audio",
        "bad_words",
        "chat_template",
        "ebnf",
        "function_call",
        "functions",
        "grammar",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "json_schema",
        "loglikelihood",
        "peft",
        "prediction",
        "prompt_logprobs",
        "regex",
        "skip_special_tokens",
        "stop_token_ids",
        "structured_outputs",
        "suffix",
        "truncate_prompt_tokens",
        "use_beam_search",
        "web_search_options",
    }
)
_IMPOSSIBLE_IN_CHAT = IMPOSSIBLE | {"best_of", "echo"}
_OF_LAST_MESSAGE = frozenset({"add_generation_prompt", "continue_final_message"})
_ONLY_IN_CHAT = _OF_LAST_MESSAGE | {"chat_template_kwargs", "response_format", "tools", "top_logprobs"}
_IMPOSSIBLE_IN_COMPLETION = IMPOSSIBLE | _ONLY_IN_CHAT

_TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]

# Those that mean here what they mean there.
_PASSED = frozenset(
    {
        "frequency_penalty",
        "ignore_eos",
        "min_p",
        "min_tokens",
        "n",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "temperature",
        "top_k",
        "top_p",
    }
)


class _BodyParams(TypedDict, total=False):
    """What only the body says: the SDK's methods say it by their name, or it is an old or foreign spelling."""

    stream: Optional[bool]
    max_completion_tokens: Annotated[Optional[int], Field(ge=1, le=2**31 - 1)]
    min_tokens: Annotated[Optional[int], Field(ge=0, le=2**31 - 1)]
    octoai: Optional[dict[str, Any]]
    modalities: Optional[Annotated[list[str], Field(fail_fast=True)]]


class ChatBody(ChatParams, _BodyParams, total=False):
    __pydantic_config__ = ChatParams.__pydantic_config__  # type: ignore[misc]
    add_generation_prompt: Optional[bool]
    chat_template_kwargs: Optional[dict[str, Any]]
    continue_final_message: Optional[bool]
    parallel_tool_calls: Optional[bool]


class CompletionBody(CompletionParams, _BodyParams, total=False):
    __pydantic_config__ = CompletionParams.__pydantic_config__  # type: ignore[misc]
    messages: Annotated[Any, GetPydanticSchema(lambda _source, handler: handler(Optional[Messages]))]
    # `prompt` as on the wire: bounded, and null for an empty one. Each kind is tried, and fails at its first wrong
    # value: an error for each value of each of them would take ten times as long.
    prompt: Annotated[
        Union[
            str,
            Annotated[list[_TokenId], Field(min_length=1, fail_fast=True)],
            Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
            Annotated[
                list[Annotated[list[_TokenId], Field(min_length=1, fail_fast=True)]],
                Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
            ],
            None,
        ],
        Field(),
    ]


_CHAT = TypeAdapter(ChatBody)
_COMPLETION = TypeAdapter(CompletionBody)


@dataclass(slots=True)
class TextRequest:
    """A request, decided; not `frozen`, as in `engines.base`.

    `generations` has one per prompt; their choices are numbered through in that order.

    `has_max_tokens`: the client said how many tokens it wants; otherwise the number is our default.
    """

    model: str
    generations: tuple[Generation, ...]
    stream: bool
    include_usage: bool
    echo: bool = False
    has_max_tokens: bool = True

    @property
    def max_tokens(self) -> int:
        return self.generations[0].max_tokens

    @property
    def num_choices(self) -> int:
        return self.generations[0].n if len(self.generations) == 1 else sum([each.n for each in self.generations])


def chat(body: bytes) -> TextRequest:
    params = checked(_CHAT, body)
    _refuse_impossible(params, _IMPOSSIBLE_IN_CHAT)
    sampling = _sampling(params)
    if params.get("logprobs"):
        sampling["logprobs"] = params.get("top_logprobs") or 0
    elif params.get("top_logprobs"):
        raise BadRequest("top_logprobs: only with logprobs set to true", param="top_logprobs")
    messages = told(params["messages"])
    generation = Generation(
        messages=messages,
        continues=continues(params, messages),
        template_kwargs=template_kwargs(params),
        schema=schema_of(params.get("response_format")),
        tools=checked_tools(params.get("tools"), params.get("tool_choice")),
        tool_choice=params.get("tool_choice"),
        parallel_tool_calls=params.get("parallel_tool_calls") is not False,
        **sampling,
    )
    return _request(params, (generation,))


def completion(body: bytes) -> TextRequest:
    params = checked(_COMPLETION, body)
    _refuse_impossible(params, _IMPOSSIBLE_IN_COMPLETION)
    sampling = _sampling(params)
    sampling["logprobs"] = params.get("logprobs")
    if (params.get("best_of") or sampling["n"]) != sampling["n"]:
        raise UnsupportedParameter("best_of: only the same value as n; ask for n and choose", param="best_of")
    prompts = [{"messages": told(params["messages"])}] if _is_chat(params) else _prompts(params.get("prompt"))
    if len(prompts) * sampling["n"] > MAX_PROMPTS:
        raise BadRequest(f"prompt: at most {MAX_PROMPTS} choices in all (prompts times n)", param="prompt")
    echo = bool(params.get("echo"))
    if echo and (sampling["logprobs"] is not None or any("text" not in prompt for prompt in prompts)):
        raise UnsupportedParameter("echo: only for prompts given as text, and without logprobs", param="echo")
    return _request(params, tuple(Generation(**prompt, **sampling) for prompt in prompts), echo=echo)


def _request(params: Mapping[str, Any], generations: tuple[Generation, ...], *, echo: bool = False) -> TextRequest:
    options = params.get("stream_options") or {}
    return TextRequest(
        model=params["model"],
        generations=generations,
        stream=bool(params.get("stream")),
        include_usage=bool(options.get("include_usage")),
        echo=echo,
        has_max_tokens=params.get("max_completion_tokens") is not None or params.get("max_tokens") is not None,
    )


def _is_chat(params: Mapping[str, Any]) -> bool:
    """OctoAI's pages on fine-tunes post `messages` to /v1/completions."""
    return params.get("prompt") is None and bool(params.get("messages"))


def _prompts(prompt: Any) -> list[dict[str, Any]]:
    if prompt is None or isinstance(prompt, str):
        return [{"text": prompt or ""}]
    if isinstance(prompt[0], int):
        return [{"tokens": prompt}]
    return [{"text": each} if isinstance(each, str) else {"tokens": each} for each in prompt]


def _sampling(params: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are given, for a `Generation`, whose defaults are the OctoAI API's. Null means the default."""
    given = without_nulls(params)
    sampling: dict[str, Any] = {name: given[name] for name in _PASSED.intersection(given)}
    sampling["is_stream"] = given.get("stream", False)
    least = sampling.get("min_tokens", 0)
    default = max(DEFAULT_MAX_TOKENS, least)
    sampling["max_tokens"] = given.get("max_completion_tokens", given.get("max_tokens", default))
    sampling.setdefault("n", 1)
    if least > sampling["max_tokens"]:
        raise BadRequest(f"min_tokens: at most max_tokens, {sampling['max_tokens']} here", param="min_tokens")
    if "octoai" in given:
        sampling = {**_old_vllm_options(given["octoai"]), **sampling}
    if "top_k" in sampling:
        sampling["top_k"] = max(0, sampling["top_k"])
    if "stop" in given:
        stop = given["stop"]
        sampling["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "logit_bias" in given:
        sampling["logit_bias"] = _logit_bias(given["logit_bias"])
    return sampling


def _old_vllm_options(extension: Mapping[str, Any]) -> dict[str, Any]:
    """`{vllm: {…}, loras: []}`, which OctoAI 0.x and 1.0 to 1.2 sent."""
    if extension.get("loras"):
        raise UnsupportedParameter("octoai.loras: no adapters are served here", param="octoai.loras")
    options = extension.get("vllm") or {}
    if not isinstance(options, dict):
        raise invalid(("octoai", "vllm"), "Input should be an object", "dict_type")
    top_k = options.get("top_k")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool)):
        raise invalid(("octoai", "vllm", "top_k"), "Input should be a valid integer", "int_type")
    if top_k is not None and not -1 <= top_k < 2**31:
        raise invalid(("octoai", "vllm", "top_k"), "Input should be between -1 and 2147483647", "int_range")
    for name in ("use_beam_search", "stop_token_ids"):
        if options.get(name):
            raise UnsupportedParameter(f"octoai.vllm.{name}: not offered here", param=f"octoai.vllm.{name}")
    return {"top_k": top_k or 0, "ignore_eos": bool(options.get("ignore_eos"))}


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid(("logit_bias", key[:MAX_SHOWN_KEY]), "Keys should be token ids: whole numbers", "int_parsing")
    return {int(key): value for key, value in bias.items()}


def _refuse_impossible(params: Mapping[str, Any], impossible: frozenset[str]) -> None:
    given = () if impossible.isdisjoint(params) else sorted(impossible.intersection(params))
    for name in given:
        if _asks_for_something(name, params):
            where = "only offered in /v1/chat/completions" if name in _ONLY_IN_CHAT else "not offered here"
            raise UnsupportedParameter(f"{name}: {where}; leave it out", param=name)
    modalities = params.get("modalities")
    if modalities and any(kind != "text" for kind in modalities):
        raise UnsupportedParameter("modalities: only text is generated here", param="modalities")


def _asks_for_something(name: str, params: Mapping[str, Any]) -> bool:
    """Whether the impossible parameter is more than its default."""
    value = params[name]
    if name in _OF_LAST_MESSAGE:
        return value is not None  # also false says whether it is to be continued
    if name == "function_call":
        return bool(value) and value not in ("none", "auto")
    if name == "best_of":
        return bool(value) and value != (params.get("n") or 1)
    if name == "response_format":
        return bool(value) and value != {"type": "text"}
    if name == "web_search_options":
        return value not in (None, False)  # an empty object is how it is asked for
    if name == "prompt_logprobs":
        return value is not None and value is not False  # 0 asks for those of the prompt itself
    if name == "skip_special_tokens":
        return value is False
    return bool(value)


__all__ = ["DEFAULT_MAX_TOKENS", "MAX_CHOICES", "TextRequest", "chat", "completion"]
