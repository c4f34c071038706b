"""Pages of another origin may ask where the operator says so, and nowhere else."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.settings import BadSettings, load
from tests.running import InProcess
from tests.talking import Talk, ask, request

PAGE = "https://chat.example"
PREFLIGHT = {"origin": PAGE, "access_control_request_method": "POST", "access_control_request_headers": "authorization"}


@pytest.fixture(params=["*", PAGE])
def origin(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def service(place: Path, **settings: str) -> InProcess:
    return InProcess(ScriptedEngine(), place, **settings)


def test_every_answer_says_whose_pages_may_read_it(tmp_path: Path, origin: str) -> None:
    with closing(service(tmp_path, allowed_origin=origin)) as here:
        body = request(here)
        for path, sent, status in (
            ("/v1/chat/completions", body, 200),
            ("/v1/chat/completions", {**body, "stream": True}, 200),
            ("/v1/chat/completions", {**body, "n": 0}, 422),
            ("/v1/chat/completions", b"{", 400),
            ("/v1/models", None, 200),
            ("/v1/nothing", None, 404),
        ):
            found, headers, _ = ask(here, path, sent, origin=PAGE)
            assert (found, headers["access-control-allow-origin"]) == (status, origin), path
            assert headers["access-control-expose-headers"] == "*"
        found, headers, _ = ask(here, "/v1/chat/completions", body, origin=PAGE, authorization="Bearer no")
        assert (found, headers["access-control-allow-origin"]) == (401, origin)
        for sent, status in ((b"no colon\r\n\r\n", 400), (b"x: " + b"a" * 70_000, 431)):
            with closing(Talk(here)) as talk:
                talk.socket.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + sent)
                found, headers, _ = talk.answer()
            assert (found, headers["access-control-allow-origin"], "date" in headers) == (status, origin, True)
            assert headers["access-control-expose-headers"] == "*"


def test_a_preflight_is_answered_without_a_token(tmp_path: Path, origin: str) -> None:
    with closing(service(tmp_path, allowed_origin=origin)) as here:
        for path in ("/v1/chat/completions", "/v1/models", "/v1/admin/accounts", "/v1/organization/costs"):
            found, headers, text = ask(here, path, method="OPTIONS", **PREFLIGHT, authorization="")
            assert (found, headers["access-control-allow-origin"], text) == (204, origin, b"")
            assert "POST" in headers["access-control-allow-methods"]
            assert headers["access-control-allow-headers"].split(", ") == ["authorization", "*"]
        assert ask(here, "/v1/models", method="OPTIONS")[0] == 405  # no browser's question


def test_nobody_elses_pages_may_ask_where_nothing_is_said(tmp_path: Path) -> None:
    with closing(service(tmp_path)) as here:
        found, headers, _ = ask(here, "/v1/chat/completions", request(here), origin=PAGE)
        assert found == 200 and not [name for name in headers if name.startswith("access-control")]
        assert ask(here, "/v1/chat/completions", method="OPTIONS", **PREFLIGHT)[0] == 405


@pytest.mark.parametrize(
    "said", ["chat.example", "https://chat.example/", "https://a, https://b", "null", "https://a\r\nx: y"]
)
def test_what_is_no_origin_is_refused_at_the_start(tmp_path: Path, said: str) -> None:
    with pytest.raises(BadSettings, match=r"^OCTOAI_ALLOWED_ORIGIN: expected \* or an origin"):
        load(path=None, environ={"HOME": str(tmp_path), "OCTOAI_ALLOWED_ORIGIN": said})
