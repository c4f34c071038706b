"""Weights from a Hugging Face hub, taken up again where an earlier pull was cut, in this process or another.

`huggingface_hub` knows addresses, tokens, checksums and errors. The bytes are read here: its own download
starts from nothing when the process before it was stopped. It is imported only when such a source is used.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from octoai.server.catalogue import HfSource
from octoai.server.sources.base import Fetched, Progress, PullFailed, require_space, said

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

_MOST_FAILURES = 5  # in a row, without a byte between them
_ELSEWHERE = "; check HF_ENDPOINT, and a proxy before it"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(
    source: HfSource,
    work: Path,
    progress: Progress,
    environ: Mapping[str, str],
    sleep: Callable[[float], None] = time.sleep,
) -> Fetched:
    """The file, in `work`, where an earlier pull may have left a part of it."""
    import httpx  # what huggingface_hub sends requests with
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    endpoint = environ.get("HF_ENDPOINT", "").rstrip("/") or None
    try:
        metadata = _metadata(source, endpoint)
        # The etag of a large file is its SHA-256, of a small one git's own hash, which is not checked.
        published = metadata.etag if metadata.etag and _SHA256.fullmatch(metadata.etag) else None
        part = _part(work, metadata)
        _download(_url(source, endpoint, metadata.commit_hash), part, metadata.size or 0, progress, sleep)
    except OfflineModeIsEnabled:
        raise PullFailed(f"cannot pull {source.repo}: HF_HUB_OFFLINE is set; unset it") from None
    except HfHubHTTPError as error:
        raise PullFailed(f"cannot pull {source.repo}/{source.filename}: {_reason(error)}") from error
    except HFValidationError as error:  # a rule of the hub's that the configuration does not know
        raise PullFailed(f"cannot pull {source.repo}: {str(error).splitlines()[0]} Correct its `repo`") from None
    except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError):  # whose words may hold a password or the token
        raise PullFailed(
            f"cannot pull {source.repo}/{source.filename}: no hub can be asked with this HF_ENDPOINT and HF_TOKEN; "
            "correct them"
        ) from None
    except ValueError as error:  # of the library's own, about what the hub says
        raise PullFailed(f"cannot pull {source.repo}/{source.filename}: {said(error)}{_ELSEWHERE}") from error
    except httpx.HTTPError as error:
        raise PullFailed(
            f"cannot pull {source.repo}/{source.filename}: the hub cannot be reached ({error}); "
            "check the network and HF_ENDPOINT, then pull again to go on where it stopped"
        ) from error
    return Fetched(part, published)


def _url(source: HfSource, endpoint: str | None, revision: str | None) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(source.repo, source.filename, revision=revision or source.revision, endpoint=endpoint)


def _metadata(source: HfSource, endpoint: str | None) -> HfFileMetadata:
    from huggingface_hub import get_hf_file_metadata

    metadata = get_hf_file_metadata(_url(source, endpoint, None), endpoint=endpoint)
    if metadata.size is None:
        raise PullFailed(f"the hub does not say how large {source.repo}/{source.filename} is: check HF_ENDPOINT")
    return metadata


def _part(work: Path, metadata: HfFileMetadata) -> Path:
    """Where this version of the file grows. Parts of other versions are of no use any more."""
    version = hashlib.sha256(f"{metadata.etag} {metadata.size}".encode()).hexdigest()[:16]
    part = work / f"{version}.part"
    for other in work.iterdir():
        if other.is_dir():  # of a source of another kind, whose pull was killed
            shutil.rmtree(other)
        elif other != part:
            other.unlink()
    if part.exists() and part.stat().st_size > (metadata.size or 0):
        part.unlink()
    return part


def _download(url: str, part: Path, size: int, progress: Progress, sleep: Callable[[float], None]) -> None:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    failures = 0
    with part.open("ab") as file:
        require_space(part.parent, size - file.tell())
        while (start := file.tell()) < size:
            progress(start, size)
            try:
                _append(url, file, size, progress)
                if file.tell() > start:
                    continue
                raise httpx.ReadError("the hub sent nothing")
            except (httpx.TransportError, HfHubHTTPError) as error:
                failures = 1 if file.tell() > start else failures + 1
                if failures >= _MOST_FAILURES or not _is_passing(error):
                    raise
                sleep(2.0 ** (failures - 1))
        progress(size, size)


def _append(url: str, file: IO[bytes], size: int, progress: Progress) -> None:
    """The rest of the file, as much of it as one answer brings."""
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

    # Uncompressed, since a range counts the bytes of the file.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={file.tell()}-"}
    session = get_session()
    with session.stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code == 206:
            _require_start(response.headers.get("Content-Range", ""), file.tell())
        else:  # the range was ignored: this is the file from its start
            _empty(file)
        # As they come: bytes that waited for a chunk to fill would be lost in a cut.
        for chunk in response.iter_bytes():
            if file.tell() + len(chunk) > size:
                _empty(file)
                raise PullFailed(f"the hub sent more than the {size} bytes it had announced{_ELSEWHERE}")
            file.write(chunk)
            progress(file.tell(), size)


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()


def _require_start(content_range: str, start: int) -> None:
    """What begins elsewhere would be joined to what is here at the wrong place."""
    if not content_range.startswith(f"bytes {start}-"):
        raise PullFailed(f"the hub sent {content_range!r:.80}, not the bytes from {start} on{_ELSEWHERE}")


def _is_passing(error: Exception) -> bool:
    """Whether trying again may help: yes for a broken connection, an overload or a fault of the server."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status in {408, 429} or status >= 500


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: "its authors give access on request: ask on its page, then set HF_TOKEN",
        errors.RepositoryNotFoundError: "no such repository, or a private one: check `repo`, or set HF_TOKEN",
        errors.RevisionNotFoundError: "no such revision: check `revision`",
        errors.EntryNotFoundError: "no such file in the repository: check `filename`",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    status = getattr(getattr(error, "response", None), "status_code", "an error")
    return f"the hub answered {status}; try again later, or check HF_TOKEN and HF_ENDPOINT"
