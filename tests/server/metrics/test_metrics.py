"""What `/metrics` says, and to whom."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from octoai.server.engines.base import Event, Finished, Generation, Started, Usage
from octoai.server.engines.scripted import ScriptedEngine
from tests.running import Start
from tests.talking import ask, chat, is_idle, metric, until

VLLM_NAMES = (
    *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
    *("cache_config_info", "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
    *(
        f"{name}_{part}"
        for name in (
            *("iteration_tokens_total", "request_prompt_tokens", "request_generation_tokens", "request_params_n"),
            *("request_params_max_tokens", "time_to_first_token_seconds", "inter_token_latency_seconds"),
            *("time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
            *("request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
            "request_num_preemptions",
        )
        for part in ("bucket", "sum", "count")
    ),
)


def test_metrics_have_vllms_names_and_labels(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    chat(service)
    until(lambda: is_idle(service))
    status, headers, text = ask(service, "/metrics", authorization="")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    lines = text.decode().splitlines()
    for name in VLLM_NAMES:
        rows = [line for line in lines if line.startswith(f"vllm:{name}{{")]
        assert rows, name
        assert all(f'model_name="{service.model}"' in row and 'engine="scripted"' in row for row in rows)
    assert metric(service, "vllm:generation_tokens_total") == 5
    assert metric(service, "vllm:prompt_tokens_total") == 2
    assert any('finished_reason="stop"' in line for line in lines)


def test_what_each_api_token_used_is_told_to_operators_alone(in_process: Start) -> None:
    """Whoever asks for the metrics now and then would know how long each request of another account was."""
    service = in_process(ScriptedEngine())
    chat(service)
    until(lambda: is_idle(service))

    def said_to(authorization: str) -> dict[str, Any]:
        text = ask(service, "/metrics", authorization=authorization)[2].decode()
        return {family.name: family.samples for family in text_string_to_metric_families(text)}

    operators = said_to(f"Bearer {service.mint('operator', scopes=('admin',)).text}")
    assert {sample.value for sample in operators["octoai_tokens"]} == {2, 0, 5}
    assert len(operators["octoai_cost_usd"]) == 1
    others = {name for name in operators if name not in ("octoai_tokens", "octoai_cost_usd")}
    for authorization in ("", f"Bearer {service.mint('other', scopes=('inference', 'usage')).text}"):
        found = said_to(authorization)
        assert set(found) == others
        assert not any("token_id" in sample.labels for samples in found.values() for sample in samples)
    status, _, body = ask(service, "/metrics", authorization="Bearer octoai_nobody")
    assert (status, json.loads(body)["code"]) == (401, "invalid_api_key")


def test_no_word_of_an_engine_becomes_a_label(in_process: Start) -> None:
    class Wordy(ScriptedEngine):
        async def _play(self, generation: Generation, prompt_tokens: int) -> AsyncGenerator[Sequence[Event]]:
            yield (Started(prompt_tokens), Finished({0: f"zebra{len(self.seen)}"}, Usage(prompt_tokens)))

    service = in_process(Wordy())
    assert [chat(service)[2]["choices"][0]["finish_reason"] for _ in range(3)] == [*("zebra1", "zebra2", "zebra3")]
    until(lambda: is_idle(service))
    text = ask(service, "/metrics")[2].decode()
    assert "zebra" not in text
    (other,) = [line for line in text.splitlines() if 'finished_reason="other"' in line]
    assert other.endswith(" 3.0")


def test_nothing_that_a_client_sends_becomes_a_label(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    chat(service, model="zebra-model")
    chat(service, model="meta-llama-3-8b-instruct")
    chat(service, no_such_zebra=1, user="zebra", temperature="zebra")
    ask(service, "/zebra/path")
    ask(service, "/v1/models/zebra")
    ask(service, "/v1/models", method="PROPFIND")
    ask(service, "/v1/models", authorization="Bearer zebra", x_request_id="zebra")
    text = ask(service, "/metrics")[2].decode()
    assert "zebra" not in text.lower()
    assert "propfind" not in text.lower()
    assert "meta-llama" not in text
