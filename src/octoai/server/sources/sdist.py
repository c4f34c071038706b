"""The source of a package that is installed as a wheel, from the package index that pip would ask.

pip itself cannot be asked: to download a source archive it begins to build it. `unearth` finds it, by pip's settings.
Nothing that is downloaded is run here.
"""

from __future__ import annotations

import ast
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octoai.server.sources.base import PullFailed, require_space, said
from octoai.server.sources.pypi import pip_environment

_INDEX = "https://pypi.org/simple"
_UNPACKED_BYTES = 300 << 20  # with the archive
_SCOPES = ("global", "download", ":env:")  # of pip's settings: the later overrides


def unpack(name: str, version: str, sha256: str, work: Path, environ: Mapping[str, str]) -> Path:
    """The source, unpacked in `work`, an empty directory; `sha256` is its archive's. Raises PullFailed."""
    import httpx2
    from unearth import HashMismatchError, PackageFinder, UnpackError
    from unearth.fetchers import PyPIClient

    what = f"the source of {name} {version}"
    require_space(work, _UNPACKED_BYTES)
    settings = _pip_settings(environ)
    refused: list[int] = []

    def note(response: httpx2.Response) -> None:
        if response.status_code >= 400:
            refused.append(response.status_code)

    try:
        client: Any = PyPIClient(  # its own types do not say that it is what the finder wants
            verify=ssl.create_default_context(cafile=settings.get("cert")),
            trusted_hosts=settings.get("trusted-host", "").split(),
            event_hooks={"response": [note]},
        )
        with client:
            finder = PackageFinder(
                session=client,
                index_urls=_index_urls(settings),
                find_links=_find_links(settings),
                no_binary=[name],
            )
            # The index may publish no hashes: the archive itself is checked.
            found = finder.find_best_match(f"{name}=={version}").best
            if found is None:
                raise PullFailed(_why_none(what, refused))
            with _umask_kept():
                return finder.download_and_unpack(found.link, work, work, hashes={"sha256": [sha256]})
    except HashMismatchError:
        raise PullFailed(f"the checksum of {what} is not the pinned one: check the package index") from None
    except UnpackError as error:
        raise PullFailed(f"cannot unpack {what}: {said(error)}") from None
    except (httpx2.InvalidURL, ValueError):  # an address that is none, in most cases
        raise PullFailed(  # not in its words, which may be a part of a password
            f"cannot download {what}: what pip's settings name is no address: check PIP_INDEX_URL first, then "
            "PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS and PIP_TRUSTED_HOST"
        ) from None
    except (httpx2.HTTPError, OSError) as error:  # of certificates and the disk too
        raise PullFailed(f"cannot download {what} ({said(error)}): check the network, or pip's settings") from None


@contextmanager
def _umask_kept() -> Iterator[None]:
    """The unpacking of a program leaves it at 0: all that we write from then on could be written by others."""
    before = os.umask(0o077)
    os.umask(before)
    try:
        yield
    finally:
        os.umask(before)


def _why_none(what: str, refused: Sequence[int]) -> str:
    """`refused` are the statuses of answers that were not the page of the package."""
    others = [status for status in refused if status != 404]
    if others:
        return f"the package index answered {others[0]} when asked for {what}: check pip's settings, or try again later"
    return f"the package index does not have {what}: check pip's settings (PIP_INDEX_URL)"


def _pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """As pip reads them from its files and the environment."""
    listed = subprocess.run(
        [sys.executable, "-P", "-m", "pip", "config", "list"],
        env=pip_environment(environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if listed.returncode:
        raise PullFailed("pip is missing, or its settings are damaged: see `python -m pip config list`")
    lines = [line.partition("=") for line in listed.stdout.splitlines() if "='" in line or '="' in line]
    found = [(*name.rpartition("."), ast.literal_eval(value)) for name, _, value in lines]
    by_scope = sorted((each for each in found if each[0] in _SCOPES), key=lambda each: _SCOPES.index(each[0]))
    return {name: value for _, _, name, value in by_scope}


def _index_urls(settings: Mapping[str, str]) -> list[str]:
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return []
    return [settings.get("index-url", _INDEX), *settings.get("extra-index-url", "").split()]


def _find_links(settings: Mapping[str, str]) -> list[str]:
    """Without places that are not there, which pip only warns of."""
    return [each for each in settings.get("find-links", "").split() if "://" in each or Path(each).exists()]
