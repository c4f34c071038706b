"""Whom a client trusts: the authorities that a service's certificate is checked against. Knows no connections."""

from __future__ import annotations

import functools
import os
import re
import sys
from typing import Any

from octoai.errors import ConfigurationError

# Where distributions keep their authorities, for an OpenSSL that was built for another one.
_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora, RHEL
    "/etc/pki/tls/certs/ca-bundle.crt",  # the same, older
    "/etc/ssl/cert.pem",  # Alpine, Arch, BSD
    "/etc/ssl/ca-bundle.pem",  # SUSE
)
_HASHED = re.compile(r"[0-9a-f]{8}\.\d+")
_last: dict[tuple[str | None, str | None], Any] = {}  # the context that was last made for a file and a directory


def tls_context() -> Any:
    """An `ssl.SSLContext` for the system's authorities, or those that `SSL_CERT_FILE` or `SSL_CERT_DIR` names. Raises
    ConfigurationError where a file is named that is not there, or holds none; but where it once did, it is being
    written, and those of before stand."""
    file, directory = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if sys.platform in ("darwin", "win32") and not (file or directory):
        import ssl

        import truststore

        # Each connection has its own: one for all lets only one shake hands at a time.
        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    file, directory = _authorities(file, directory)
    places = [file, *(directory or "").split(os.pathsep)]
    try:
        context = _context(file, directory, tuple(map(_state, places)))
    except ConfigurationError:
        if (file, directory) not in _last:
            raise
        return _last[file, directory]
    _last[file, directory] = context
    return context


def _authorities(file: str | None, directory: str | None) -> tuple[str | None, str | None]:
    """As OpenSSL has it: either variable takes the place of one default, and leaves the other."""
    import ssl

    defaults = ssl.get_default_verify_paths()
    directory = directory or (defaults.openssl_capath if os.path.isdir(defaults.openssl_capath) else None)
    file = file or (defaults.openssl_cafile if os.path.isfile(defaults.openssl_cafile) else None)
    if file is None and not _has_certificates(directory):
        file = next(filter(os.path.isfile, _FILES), None)
    return file, directory


@functools.lru_cache(maxsize=8)  # to read the authorities takes as long as several requests
def _context(file: str | None, directory: str | None, _states: tuple[object, ...]) -> Any:
    """With Python's own settings, which differ from version to version, but for one. Made anew when the places have
    changed."""
    import ssl

    try:
        context = ssl.create_default_context(cafile=file, capath=directory)
    except OSError as error:
        if error.filename:  # authorities are read without
            message = f"SSLKEYLOGFILE={error.filename} should be a file that can be written: {error.strerror}"
            raise ConfigurationError(message=message) from error
        name = f"SSL_CERT_FILE={file}" if file == os.environ.get("SSL_CERT_FILE") else file
        message = f"the authorities for TLS cannot be read from {name}, which should be a file of certificates: {error}"
        raise ConfigurationError(message=message) from error
    # Python 3.13 and later set it, and it refuses many a company's own authority, for extensions that it lacks.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _state(place: str | None) -> tuple[int, int] | None:
    """Other once certificates have been exchanged there."""
    try:
        found = os.stat(place or "")
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _has_certificates(directory: str | None) -> bool:
    """Whether OpenSSL would find any there: it asks for them by a hash of their names."""
    try:
        return any(_HASHED.fullmatch(name) for part in (directory or "").split(os.pathsep) for name in os.listdir(part))
    except OSError:
        return False
