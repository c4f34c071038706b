"""Answers that are compressed although nobody asked for it, whole and cut short."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest

from octoai import ApiConnectionError, StreamInterrupted
from octoai._answers import Decompressor
from tests.sdk.misbehaving import Exchange, answer, words

TEXT = json.dumps(answer("hello " * 50)).encode()
BARE = zlib.compressobj(wbits=-15)
FORMS = {
    "gzip": gzip.compress(TEXT),
    "two members": gzip.compress(TEXT[:40]) + gzip.compress(TEXT[40:]),
    "a padded member": gzip.compress(TEXT) + b"\0" * 9,
    "a member and what is none": gzip.compress(TEXT) + b"\0garbage",
    "zlib": zlib.compress(TEXT),
    "bare deflate": BARE.compress(TEXT) + BARE.flush(),
}


def headers(form: str) -> dict[str, str]:
    return {"content-encoding": "gzip" if "member" in form or form == "gzip" else "deflate"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_every_form_is_read_however_it_is_cut(form: str, size: int) -> None:
    decompressor, data = Decompressor(headers(form)), FORMS[form]
    assert b"".join(decompressor.feed(data[at : at + size]) for at in range(0, len(data), size)) == TEXT
    decompressor.end()


@pytest.mark.parametrize("form", ["gzip", "zlib", "bare deflate"])
@pytest.mark.parametrize("left", [1, 5, 30])
def test_a_body_cut_short_is_no_answer(api: Any, serve: Any, form: str, left: int) -> None:
    coding = headers(form)["content-encoding"]
    server = serve(lambda x: x.reply(200, FORMS[form][:left], content_encoding=coding))
    with pytest.raises(ApiConnectionError, match="cut off: its compression"):
        api.chat(api.client(base_url=server.url, max_retries=0))


def test_an_empty_body_is_not_cut() -> None:
    Decompressor({"content-encoding": "gzip"}).end()


def test_a_stream_of_events_cut_short_raises(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream(content_encoding="gzip")
        packer = zlib.compressobj(wbits=31)
        x.part(packer.compress(b'data: {"a": 1}\n\n') + packer.flush(zlib.Z_SYNC_FLUSH))
        x.end_stream(done=False)

    with pytest.raises(StreamInterrupted):
        api.all(api.client().infer_stream(serve(script).url, {}))


def test_a_stream_whose_answer_is_whole_needs_no_end_of_its_compression(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream(content_encoding="gzip")
        packer = zlib.compressobj(wbits=31)
        body = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in words())
        x.part(packer.compress(body) + packer.flush(zlib.Z_SYNC_FLUSH))
        x.end_stream(done=False)

    assert len(api.all(api.stream(api.client(base_url=serve(script).url)))) == 3
