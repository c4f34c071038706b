"""Source archives made here, in a package index on this machine, found by pip's settings."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from octoai.server.sources import PullFailed
from octoai.server.sources.sdist import unpack

NAME = "some-kernels"


class Quiet(SimpleHTTPRequestHandler):
    """Answers with the files of a directory. `refusals` are the statuses for addresses that end so."""

    refusals: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        for end, status in self.refusals.items():
            if self.path.endswith(end):
                self.send_error(status)
                return
        super().do_GET()

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package index as files, with version 1.5 of one package."""
    page = tmp_path / "index" / "simple" / NAME
    page.mkdir(parents=True)
    with tarfile.open(page / "some_kernels-1.5.tar.gz", "w:gz") as archive:
        for name, data in (
            ("some_kernels-1.5/src/a.c", b"int a;"),
            ("some_kernels-1.5/setup.py", b"raise SystemExit(9)"),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
    (page / "some_kernels-1.5-py3-none-any.whl").write_bytes(b"not what is wanted")
    links = "".join(f'<a href="{path.name}">{path.name}</a>' for path in page.iterdir())
    (page / "index.html").write_text(links)
    return tmp_path / "index"


@pytest.fixture
def environ(folder: Path) -> Iterator[dict[str, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    url = f"http://127.0.0.1:{server.server_port}/simple"
    yield own | {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, "PIP_CONSTRAINT": "/does/not/exist"}
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def checksum(folder: Path) -> str:
    return hashlib.sha256((folder / "simple" / NAME / "some_kernels-1.5.tar.gz").read_bytes()).hexdigest()


def why_not(version: str, sha256: str, work: Path, environ: dict[str, str]) -> str:
    with pytest.raises(PullFailed) as raised:
        unpack(NAME, version, sha256, work, environ)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_archive_is_unpacked_and_nothing_of_it_is_run(folder: Path, work: Path, environ: dict[str, str]) -> None:
    source = unpack(NAME, "1.5", checksum(folder), work, environ)
    assert (source / "src" / "a.c").read_bytes() == b"int a;"


def test_what_is_written_after_it_is_for_others_to_write_no_more_than_before(
    folder: Path, work: Path, environ: dict[str, str]
) -> None:
    """Some of the archive can be run, which unearth makes so by setting the umask to 0."""
    before = os.umask(0o027)
    try:
        unpack(NAME, "1.5", checksum(folder), work, environ)
        assert os.umask(before) == 0o027
    finally:
        os.umask(before)


def test_another_archive_than_the_pinned_one_is_not_unpacked(work: Path, environ: dict[str, str]) -> None:
    assert "the checksum of the source of some-kernels 1.5 is not the pinned one" in why_not(
        "1.5", "0" * 64, work, environ
    )
    assert not (work / "src").exists()


def test_what_is_no_archive_is_one_line(folder: Path, work: Path, environ: dict[str, str]) -> None:
    (folder / "simple" / NAME / "some_kernels-1.5.tar.gz").write_bytes(b"nothing")
    assert "the source of some-kernels 1.5" in why_not("1.5", checksum(folder), work, environ)


def test_a_version_that_the_index_does_not_have(work: Path, environ: dict[str, str]) -> None:
    assert "does not have the source of some-kernels 1.6: check pip's settings" in why_not(
        "1.6", "0" * 64, work, environ
    )


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        (f"{NAME}/", 401, "the package index answered 401"),
        (f"{NAME}/", 500, "the package index answered 500"),
        (f"{NAME}/", 404, "the package index does not have"),
        (".tar.gz", 403, "403 Forbidden"),
        (".tar.gz", 404, "404 Not Found"),
    ],
)
def test_what_an_index_with_a_password_answers_is_said_without_it(
    work: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, end: str, status: int, words: str
) -> None:
    monkeypatch.setattr(Quiet, "refusals", {end: status})
    url = environ["PIP_INDEX_URL"].replace("//", "//user:secret@")
    said = why_not("1.5", "0" * 64, work, environ | {"PIP_INDEX_URL": url})
    assert words in said
    assert "secret" not in said


@pytest.mark.parametrize(
    "settings",
    [
        {"PIP_INDEX_URL": "http://[user:secret@x/simple"},
        {"PIP_INDEX_URL": "http://user:secret@127.0.0.1:port/simple"},
        {"PIP_INDEX_URL": "http://user:secret/more@127.0.0.1/simple"},  # a part of it is where a port would be
        {"PIP_INDEX_URL": "user:secret@127.0.0.1/simple"},
        {"PIP_TRUSTED_HOST": "[x:user:secret@host"},
    ],
)
def test_an_address_that_is_none_is_one_line(work: Path, environ: dict[str, str], settings: dict[str, str]) -> None:
    said = why_not("1.5", "0" * 64, work, environ | settings)
    assert "what pip's settings name is no address: check PIP_INDEX_URL first" in said
    assert "PIP_TRUSTED_HOST" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    "settings",
    [{"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}, {"PIP_CERT": "/does/not/exist"}, {"PIP_NO_INDEX": "1"}],
)
def test_an_index_that_cannot_be_reached(work: Path, environ: dict[str, str], settings: dict[str, str]) -> None:
    assert "check " in why_not("1.5", "0" * 64, work, environ | settings)


def test_a_file_of_pips_settings_counts_and_the_environment_more(
    folder: Path, work: Path, environ: dict[str, str]
) -> None:
    file = work.parent / "pip.conf"
    file.write_text("[global]\nindex-url = http://127.0.0.1:9/simple\nfind-links = /does/not/exist\n")
    assert unpack(NAME, "1.5", checksum(folder), work, environ | {"PIP_CONFIG_FILE": str(file)})
