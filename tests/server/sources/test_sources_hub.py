"""A hub on this machine, with what a download needs of it, and the faults of a long one."""

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from octoai.server.catalogue import HfSource, Model
from octoai.server.sources import PullFailed, WeightStore
from octoai.server.sources.hub import fetch

CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "c0ffee" * 6 + "c0ff"
PLACE = re.compile(r"/org/tiny/resolve/(main|c0ffee\w+)/q4/m\.gguf")


class Hub:
    """Answers with the file. `cuts` are sizes after which an answer breaks off, one for each GET until used
    up; `refusals` are statuses, used up likewise; `shift` is how far from where it was asked for an answer begins,
    `surplus` how many bytes it sends after the file."""

    def __init__(self) -> None:
        self.etag = SHA256
        self.content = CONTENT
        self.cuts: list[int] = []
        self.refusals: list[int] = []
        self.shift = 0
        self.surplus = 0
        self.honours_ranges = True
        self.error_code = ""
        self.location = ""
        self.ranges: list[str] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.tokens.add(self.headers["authorization"])
                if hub.head(self):
                    self.send_header("content-length", str(len(hub.content)))
                    self.end_headers()

            def do_GET(self) -> None:
                hub.ranges.append(self.headers.get("range", ""))
                hub.body(self)

            def log_message(self, *_args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.environ = {"HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}"}

    def head(self, handler: BaseHTTPRequestHandler, status: int = 200) -> bool:
        if self.error_code or not PLACE.fullmatch(handler.path):
            handler.send_response(404)
            handler.send_header("x-error-code", self.error_code or "EntryNotFound")
            handler.end_headers()
            return False
        if self.location:
            handler.send_response(302)
            handler.send_header("location", self.location)
            handler.end_headers()
            return False
        handler.send_response(status)
        handler.send_header("etag", f'"{self.etag}"')
        handler.send_header("x-repo-commit", COMMIT)
        return True

    def body(self, handler: BaseHTTPRequestHandler) -> None:
        if self.refusals:
            handler.send_error(self.refusals.pop(0))
            return
        start = int(handler.headers["range"].removeprefix("bytes=").removesuffix("-"))
        start = start + self.shift if self.honours_ranges else 0
        if not self.head(handler, 206 if self.honours_ranges else 200):
            return
        rest = self.content[start:] + b"?" * self.surplus
        handler.send_header("content-length", str(len(rest)))
        handler.send_header("content-range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.end_headers()
        with suppress(ConnectionError):  # who is sent too much goes
            handler.wfile.write(rest[: self.cuts.pop(0)] if self.cuts else rest)
        handler.close_connection = True

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.stop()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


SOURCE = HfSource("hf", "org/tiny", "q4/m.gguf")
MODEL = Model("tiny", source=SOURCE, sha256=SHA256)


def fetched(hub: Hub, work: Path) -> tuple[bytes, list[float]]:
    """The file, and the pauses that were made."""
    pauses: list[float] = []
    result = fetch(SOURCE, work, lambda *_: None, hub.environ, sleep=pauses.append)
    return result.path.read_bytes(), pauses


def test_a_file_is_pulled_from_the_endpoint_in_the_environment(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.environ["HF_ENDPOINT"])
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    told: list[tuple[int, int | None]] = []
    store = WeightStore(tmp_path)
    path = store.pull(MODEL, lambda *done: told.append(done))
    assert path.read_bytes() == CONTENT
    assert store.path(MODEL) == path
    assert told[0] == (0, len(CONTENT))
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert hub.tokens == {"Bearer hf_test"}
    assert not list((tmp_path / "partial").iterdir())


def test_a_cut_answer_is_taken_up_where_it_broke_off(hub: Hub, work: Path) -> None:
    hub.cuts = [1_000_000, 500_000]
    content, pauses = fetched(hub, work)
    assert content == CONTENT
    assert hub.ranges == ["bytes=0-", "bytes=1000000-", "bytes=1500000-"]
    assert pauses == [1.0, 1.0]


def test_a_later_pull_goes_on_where_an_earlier_one_stopped(hub: Hub, tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    def stop_halfway(done_bytes: int, _total: int | None) -> None:
        if done_bytes > 1_000_000:
            raise Stopped

    store = WeightStore(tmp_path, hub.environ)
    with pytest.raises(Stopped):
        store.pull(MODEL, stop_halfway)
    assert store.path(MODEL) is None
    assert store.pull(MODEL).read_bytes() == CONTENT
    assert hub.ranges[0] == "bytes=0-"
    assert int(hub.ranges[1].removeprefix("bytes=").removesuffix("-")) > 1_000_000


def test_a_server_that_ignores_ranges_starts_again(hub: Hub, work: Path) -> None:
    hub.cuts = [1_000_000]
    hub.honours_ranges = False
    assert fetched(hub, work)[0] == CONTENT


def test_a_server_that_ignores_ranges_and_cuts_every_time_does_not_come_to_a_whole_file(hub: Hub, work: Path) -> None:
    hub.content, hub.cuts = CONTENT[:1000], [400, *[700] * 9]
    hub.honours_ranges = False
    with pytest.raises(PullFailed, match="the hub cannot be reached"):
        fetched(hub, work)
    assert [path.stat().st_size for path in work.iterdir()] == [700]


@pytest.mark.parametrize("honours_ranges", [True, False])
def test_no_more_is_kept_than_was_announced(hub: Hub, work: Path, honours_ranges: bool) -> None:
    hub.surplus = 10_000_000
    hub.honours_ranges = honours_ranges
    told: list[int] = []
    with pytest.raises(PullFailed, match="sent more than the 3000000 bytes"):
        fetch(SOURCE, work, lambda done, _: told.append(done), hub.environ)
    assert max(told) <= len(CONTENT)
    hub.surplus = 0
    assert fetched(hub, work)[0] == CONTENT


def test_a_part_that_begins_elsewhere_is_refused_and_what_is_here_is_kept(hub: Hub, work: Path) -> None:
    hub.cuts, hub.shift = [1_000_000], 0

    def elsewhere(_seconds: float) -> None:
        hub.shift = -500_000

    with pytest.raises(PullFailed, match="not the bytes from 1000000 on"):
        fetch(SOURCE, work, lambda *_: None, hub.environ, sleep=elsewhere)
    hub.shift = 0
    assert fetched(hub, work)[0] == CONTENT
    assert hub.ranges[-1] == "bytes=1000000-"


def test_what_a_killed_pull_from_another_kind_of_source_left_is_dropped(hub: Hub, work: Path) -> None:
    (work / "wheel").mkdir()
    (work / "wheel" / "half.whl").write_bytes(b"old")
    assert fetched(hub, work)[0] == CONTENT
    assert len(list(work.iterdir())) == 1


def test_parts_of_an_older_version_are_dropped(hub: Hub, work: Path) -> None:
    (work / "0123.part").write_bytes(b"old")
    assert fetched(hub, work)[0] == CONTENT
    assert len(list(work.iterdir())) == 1


def test_a_passing_refusal_is_tried_again(hub: Hub, work: Path) -> None:
    hub.refusals = [503, 429]
    content, pauses = fetched(hub, work)
    assert content == CONTENT
    assert pauses == [1.0, 2.0]


def test_a_lasting_refusal_is_one_line(hub: Hub, work: Path) -> None:
    hub.refusals = [403] * 9
    with pytest.raises(PullFailed, match="the hub answered 403"):
        fetched(hub, work)
    assert len(hub.refusals) == 8


def test_a_hub_that_only_cuts_is_given_up_and_the_part_is_kept(hub: Hub, work: Path) -> None:
    hub.cuts = [2_000_000, *[0] * 9]
    with pytest.raises(PullFailed, match="pull again to go on where it stopped") as caught:
        fetched(hub, work)
    assert "\n" not in str(caught.value)
    assert len(hub.ranges) == 5
    hub.cuts = []
    assert fetched(hub, work)[0] == CONTENT
    assert hub.ranges[-1] != "bytes=0-"


@pytest.mark.parametrize("pinned", [SHA256, None], ids=["pinned", "as the hub says"])
def test_damaged_content_is_refused_and_deleted(hub: Hub, tmp_path: Path, pinned: str | None) -> None:
    hub.content = CONTENT[:-1] + b"?"
    model = Model("tiny", source=SOURCE, sha256=pinned)
    store = WeightStore(tmp_path, hub.environ)
    with pytest.raises(PullFailed, match="not the expected ones"):
        store.pull(model)
    assert store.path(model) is None
    assert not list((tmp_path / "partial").iterdir())


@pytest.mark.parametrize(
    ("error_code", "reason"),
    [
        ("GatedRepo", "ask on its page"),
        ("RepoNotFound", "no such repository"),
        ("RevisionNotFound", "no such revision"),
        ("EntryNotFound", "no such file in the repository"),
        ("Other", "the hub answered 404"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub: Hub, work: Path, error_code: str, reason: str) -> None:
    hub.error_code = error_code
    with pytest.raises(PullFailed, match=f"cannot pull org/tiny/q4/m.gguf: .*{reason}") as caught:
        fetched(hub, work)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_line(work: Path) -> None:
    with pytest.raises(PullFailed, match="the hub cannot be reached") as caught:
        fetch(SOURCE, work, lambda *_: None, {"HF_ENDPOINT": "http://127.0.0.1:1"}, sleep=lambda _: None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("repo", ["org/name.git", "org/na--me", f"org/{'n' * 120}"])
def test_a_name_that_no_hub_takes_is_one_line(work: Path, repo: str) -> None:
    source = HfSource("hf", repo, "m.gguf")
    with pytest.raises(PullFailed, match=f"cannot pull {repo}: .*orrect its `repo`") as caught:
        fetch(source, work, lambda *_: None, {"HF_ENDPOINT": "http://127.0.0.1:1"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:port", "http://user:secret@hub:port"])
def test_an_endpoint_that_is_no_address_is_one_line(work: Path, endpoint: str) -> None:
    with pytest.raises(PullFailed, match="this HF_ENDPOINT and HF_TOKEN; correct them") as caught:
        fetch(SOURCE, work, lambda *_: None, {"HF_ENDPOINT": endpoint})
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("token", ["hf_secretä", "hf_sec\x0bret"])
def test_a_token_that_no_header_can_hold_is_one_line_and_not_said(
    hub: Hub, work: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PullFailed, match="this HF_ENDPOINT and HF_TOKEN; correct them") as caught:
        fetched(hub, work)
    assert "hf_" not in str(caught.value)


def test_what_else_the_library_objects_to_is_said_in_its_words(hub: Hub, work: Path) -> None:
    hub.location = "http://[elsewhere"
    with pytest.raises(PullFailed, match=r"cannot pull org/tiny/q4/m.gguf: Invalid IPv6 URL; check HF_ENDPOINT"):
        fetched(hub, work)
