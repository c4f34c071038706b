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


def tls_context() -> Any:
    """An `ssl.SSLContext` for the system's authorities, or those that `SSL_CERT_FILE` or `SSL_CERT_DIR` names."""
    file, directory = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if sys.platform in ("darwin", "win32") and not (file or directory):
        import ssl

        import truststore

        # Each connection has its own: one for all lets only one shake hands at a time.
        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return _context(file, directory)


@functools.cache  # to read the authorities takes as long as several requests
def _context(file: str | None, directory: str | None) -> Any:
    """As OpenSSL has it: either variable takes the place of one default, and leaves the other."""
    import ssl

    context, defaults = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.get_default_verify_paths()
    directory = directory or (defaults.openssl_capath if os.path.isdir(defaults.openssl_capath) else None)
    source = file or (defaults.openssl_cafile if os.path.isfile(defaults.openssl_cafile) else None)
    if source is None and not _has_certificates(directory):
        source = next(filter(os.path.isfile, _FILES), None)
    try:
        if source or directory:
            context.load_verify_locations(source, directory)
    except OSError as error:
        name = f"SSL_CERT_FILE={file}" if file else source
        message = f"the authorities for TLS cannot be read from {name}, which should be a file of certificates: {error}"
        raise ConfigurationError(message=message) from error
    return context


def _has_certificates(directory: str | None) -> bool:
    """Whether OpenSSL would find any there: it asks for them by a hash of their names."""
    try:
        return any(_HASHED.fullmatch(name) for part in (directory or "").split(":") for name in os.listdir(part))
    except OSError:
        return False
