"""`octoai price …`: on the database itself, and beside a service that runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from octoai.cli import main
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.store import Place, connect
from tests.running import InProcess
from tests.talking import ask

Octoai = Callable[..., str]
SET = ("price", "set", "smollm2", "--input", "0.5", "--output", "0.25")


@pytest.fixture
def octoai(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Octoai:
    """On a database that no service has seen yet."""
    connect(Place(tmp_path / "data0")).close()

    def run(*arguments: str, status: int = 0) -> str:
        assert main([*arguments, "--data-dir", str(tmp_path / "data0")]) == status
        said = capsys.readouterr()
        if status == 0:
            assert said.err == ""
            return said.out
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert said.err.startswith("octoai: ")
        return said.err

    return run


def price(octoai: Octoai, model: str = "smollm2") -> dict[str, Any]:
    (found,) = json.loads(octoai("price", "list", model, "--json"))
    assert isinstance(found, dict)
    return found


def test_before_the_first_start_the_catalogues_prices_are_shown(octoai: Octoai) -> None:
    head, *lines = octoai("price", "list").splitlines()
    assert head.split()[0] == "MODEL"
    rows = {line.split()[0]: line for line in lines}
    assert rows["smollm2-135m-instruct"].split()[1:4] == ["0.02", "0.02", "0.02"]
    assert rows["meta-llama-3.1-405b-instruct"].split()[1:4] == ["3.00", "3.00", "9.00"]
    assert rows["smollm2-135m-instruct"].endswith("catalogue")


def test_a_price_is_set_from_now_on(octoai: Octoai) -> None:
    said = octoai(*SET, "--cached-input", "0.05")
    assert said.startswith(
        "smollm2-135m-instruct: 0.50 input, 0.05 cached input, 0.25 output, USD per million tokens, from "
    )
    found = price(octoai)
    assert (found["input"], found["cached_input"], found["output"]) == ("0.50", "0.05", "0.25")
    assert found["valid_from"] == pytest.approx(time.time(), abs=10)
    assert found["upcoming"] == []
    octoai(*SET)  # without its own price, a cached token costs what any other does
    assert price(octoai)["cached_input"] == "0.50"
    assert price(octoai, "mixtral-8x7b-instruct")["input"] == "0.45"


def test_a_price_to_come_is_listed_beside_the_one_in_force(octoai: Octoai) -> None:
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%d")
    octoai(*SET, "--from", tomorrow)
    found = price(octoai)
    assert found["input"] == "0.02"
    assert [each["input"] for each in found["upcoming"]] == ["0.50"]
    now, coming = octoai("price", "list", "smollm2").splitlines()[1:]
    assert now.endswith("catalogue")
    assert f"{tomorrow} 00:00" in coming
    assert coming.endswith("operator")
    assert "never changes" in octoai(*SET, "--from", tomorrow, status=1)


def test_a_price_in_the_past_is_refused_with_the_reason(octoai: Octoai) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    for moment in (yesterday.strftime("%Y-%m-%d"), yesterday.strftime("%Y-%m-%dT%H:%M:%SZ")):
        assert "a bill never changes afterwards" in octoai(*SET, "--from", moment, status=1)
    assert price(octoai)["input"] == "0.02"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("price", "list", "smollm9"), "smollm2"),
        (("price", "set", "smollm9", "--input", "1", "--output", "1"), "smollm2"),
        (("price", "set", "smollm2", "--input", "cheap", "--output", "1"), "--input"),
        (("price", "set", "smollm2", "--input", "1", "--output", "-1"), "--output"),
        (("price", "set", "smollm2", "--input", "0.0001", "--output", "1"), "finer"),
        ((*SET, "--cached-input", ""), "--cached-input"),
        ((*SET, "--from", "someday"), "--from"),
        ((*SET, "--config", "missing.toml"), "missing.toml"),
    ],
)
def test_what_is_wrong_is_one_line(octoai: Octoai, arguments: tuple[str, ...], said: str) -> None:
    assert said in octoai(*arguments, status=1)


@pytest.mark.parametrize("arguments", [(), ("set", "smollm2"), ("set", "--input", "1"), ("fly",)])
def test_wrong_usage_is_status_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["price", *arguments])
    assert ended.value.code == 2
    assert "usage: octoai price" in capsys.readouterr().err


def test_models_of_the_configuration_have_prices_too(octoai: Octoai, tmp_path: Path) -> None:
    config = tmp_path / "octoai.toml"
    config.write_text('[[models]]\nid = "mine"\nengine_url = "http://x/v1"\ninput_price = "7"\noutput_price = "8"\n')
    (found,) = json.loads(octoai("price", "list", "mine", "--json", "--config", str(config)))
    assert (found["input"], found["output"]) == ("7.00", "8.00")
    octoai("price", "set", "mine", "--input", "1", "--output", "2", "--config", str(config))


def test_a_service_that_runs_takes_it_over(in_process: Callable[..., InProcess], octoai: Octoai) -> None:
    service = in_process(ScriptedEngine())
    octoai(*SET)
    time.sleep(0.4)
    listed = json.loads(ask(service, "/v1/pricing")[2])["data"]
    (shown,) = [each for each in listed if each["id"] == service.model]
    assert (shown["input"], shown["output"]) == ("0.50", "0.25")
