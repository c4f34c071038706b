"""Which service to talk to, and with which token: argument, then environment, then the credentials file.

The file is `credentials.toml`, written by `octoai serve` and read by every client of the same user:

    endpoint = "http://127.0.0.1:8000"
    token = "…"

Its token is for its own endpoint and is never sent anywhere else. Sends nothing itself.
"""

from __future__ import annotations

import os

from octoai.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

DEFAULT_ENDPOINT = "http://127.0.0.1:8000"
DEAD_HOSTS = ("octoai.run", "octoai.cloud", "octo.ai")
TOKEN_VARIABLES = ("OCTOAI_TOKEN", "OCTOAI_API_TOKEN", "OCTOAI_API_KEY")
ENDPOINT_VARIABLES = ("OCTOAI_BASE_URL", "OCTOAI_API_BASE")
_FILENAME = "credentials.toml"
_KNOWN_PATHS = ("/chat/completions", "/completions", "/v1")


class Credentials:
    """What the credentials file says."""

    __slots__ = ("endpoint", "token")

    def __init__(self, endpoint: str, token: str | None) -> None:
        self.endpoint = endpoint
        self.token = token

    def __repr__(self) -> str:
        return f"Credentials(endpoint={self.endpoint!r}, token={'…' if self.token else None})"


class Access:
    """A service and the right to use it. `only_for` limits the token to one origin, that of the credentials file it is
    from; None means no such limit. `variable` of the environment has the token, where no caller gave one."""

    __slots__ = ("base_url", "only_for", "token", "variable")

    def __init__(self, base_url: str, token: Any, only_for: str | None = None, variable: str | None = None) -> None:
        self.base_url = base_url
        self.token = token
        self.only_for = only_for
        self.variable = variable

    def covers(self, url: str) -> bool:
        """Whether the token may be sent to this address."""
        return self.only_for is None or origin(url) == self.only_for

    def refused(self, url: str) -> str | None:
        """Where the token is from that this address did not take, and whether there is another for it; None where a
        caller gave it. Never the token itself."""
        if self.only_for is not None:
            return f"The token that was sent is that of the credentials file {path()}"
        if self.variable is None:
            return None
        said = f"The token that was sent is that of the environment variable {self.variable}"
        stored = _stored_token()
        if stored is None or origin(stored.endpoint) != origin(url) or stored.token == self.token:
            return said
        return f"{said}; unset it to send the one that the credentials file {path()} has for this service"

    def missing(self, url: str) -> str:
        """Where a token for this address can be given, and whom the stored one is for, where that is another."""
        stored = _stored_token()
        if stored is None or origin(stored.endpoint) == origin(url):
            about = " (`octoai serve` writes it)"
        else:
            about = f", whose token is for {origin(stored.endpoint)} only"
        return (
            "No token was sent: give one as OctoAI(api_key=…), in the environment variable OCTOAI_TOKEN, "
            f"or in the credentials file {path()}{about}"
        )


def resolve(*, base_url: str | None, token: Any, environ: Mapping[str, str] | None = None) -> Access:
    """`base_url` and `token` are what the user gave; `token` may be a callable."""
    environ = os.environ if environ is None else environ
    variable = None if token else _first_of(environ, TOKEN_VARIABLES)
    token = token or (variable and environ[variable])
    base_url = base_url or _first(environ, ENDPOINT_VARIABLES)
    stored = None if (base_url and token) else read(environ=environ)
    url = checked_base_url(base_url or (stored.endpoint if stored else DEFAULT_ENDPOINT))
    if token:
        return Access(url, token.strip() if isinstance(token, str) else token, variable=variable)
    if stored and stored.token and origin(stored.endpoint) == origin(url):
        return Access(url, stored.token, only_for=origin(url))
    return Access(url, None)


def configured_endpoint(environ: Mapping[str, str] | None = None) -> str:
    """The endpoint of whoever names none."""
    environ = os.environ if environ is None else environ
    named = _first(environ, ENDPOINT_VARIABLES)
    if not named:
        stored = read(environ=environ)
        named = stored.endpoint if stored else DEFAULT_ENDPOINT
    return checked_base_url(named)


def directory(environ: Mapping[str, str] | None = None) -> str | None:
    """None where it is in a home that nobody knows: then there is no credentials file, and none is written."""
    environ = os.environ if environ is None else environ
    found = os.path.expanduser(_named(environ))
    return None if found.split(os.sep)[0] == "~" else found


def path(environ: Mapping[str, str] | None = None) -> Path:
    """Where the credentials file is, or would be, as a person is told it."""
    from pathlib import Path

    environ = os.environ if environ is None else environ
    return Path(directory(environ) or _named(environ), _FILENAME)


def read(file: str | os.PathLike[str] | None = None, *, environ: Mapping[str, str] | None = None) -> Credentials | None:
    """The credentials stored for this user; None if there are none."""
    name = os.fspath(file) if file is not None else _file(environ)
    if name is None:
        return None
    try:
        with open(name, "rb") as opened:
            content = opened.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigurationError(message=f"the credentials file {name} cannot be read: {error.strerror}") from error
    import tomllib

    try:
        values = tomllib.loads(content.decode())
    except ValueError as error:
        raise ConfigurationError(message=f"the credentials file {name} is not valid TOML: {error}") from error
    endpoint, token = values.get("endpoint") or DEFAULT_ENDPOINT, values.get("token") or None
    if not isinstance(endpoint, str) or not isinstance(token, str | None):
        raise ConfigurationError(message=f"in the credentials file {name}, endpoint and token must be strings")
    return Credentials(endpoint, token)


def write(endpoint: str, token: str, file: str | os.PathLike[str] | None = None) -> Path:
    """Store both for this user; readable by nobody else at any moment, replaced in one step."""
    name = os.fspath(file) if file is not None else _file(None)
    if name is None:
        raise ConfigurationError(
            message="cannot store the credentials: this user has no home directory; set OCTOAI_CONFIG_DIR to a "
            "directory that can be written"
        )
    try:
        _replace(name, f"endpoint = {_quoted(endpoint)}\ntoken = {_quoted(token)}\n")
    except OSError as error:
        raise ConfigurationError(
            message=f"cannot store the credentials in {name}: {error.strerror}; "
            "set OCTOAI_CONFIG_DIR to a directory that can be written"
        ) from error
    from pathlib import Path

    return Path(name)


def _replace(name: str, content: str) -> None:
    os.makedirs(os.path.dirname(name) or ".", mode=0o700, exist_ok=True)
    scratch = f"{name}.{os.getpid()}.{os.urandom(4).hex()}"
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as opened:
            opened.write(content)
        os.replace(scratch, name)
    except BaseException:
        os.unlink(scratch)
        raise


def checked_base_url(url: str) -> str:
    """The root of the service, without `/v1` and without a slash at the end."""
    url = checked_url(url).split("?")[0].split("#")[0].rstrip("/")
    for known in _KNOWN_PATHS:
        url = url.removesuffix(known).rstrip("/")
    return url


def checked_url(url: str) -> str:
    """The address itself, if it is one that may be contacted."""
    if not isinstance(url, str):
        raise ConfigurationError(message=f"an address must be a string, not {type(url).__name__}")
    url = url.strip()
    scheme, host, _ = _split(url)
    if (
        scheme not in ("http", "https")
        or not host
        or "%" in host.partition("[")[0]
        or any(ord(char) <= 32 or ord(char) == 127 for char in url)
    ):
        raise ConfigurationError(message=f"not an http:// or https:// address: {url!r}")
    if "@" in url.partition("://")[2].split("/")[0]:
        raise ConfigurationError(message="an address must not hold a user name or password: use api_key=")
    if any(host == dead or host.endswith(f".{dead}") for dead in DEAD_HOSTS):
        raise ConfigurationError(
            message=f"{host}: OctoAI's hosted service was shut down in October 2024; it is never contacted. "
            "Set OCTOAI_BASE_URL (or base_url=) to a service of your own; `octoai serve` starts one."
        )
    return url


def origin(url: str) -> str:
    scheme, host, port = _split(url)
    return f"{scheme}://{host}:{port}"


def _split(url: str) -> tuple[str, str, str]:
    """Scheme, host and port, in one spelling. By hand: `urllib.parse` would double the cost of a client."""
    scheme, _, rest = url.partition("://")
    for end in "/\\?#":
        rest = rest.partition(end)[0]
    authority = rest.rpartition("@")[2].lower()
    scheme = scheme.lower()
    if authority.startswith("["):
        host, _, port = authority.partition("]")
        host, port = f"{host}]", port.removeprefix(":")
    else:
        host, _, port = authority.partition(":")
    if not host.isascii():
        host = _looked_up(host)
    return scheme, host.rstrip("."), port or ("443" if scheme == "https" else "80")


def _looked_up(host: str) -> str:
    """As a resolver will ask for it: what Unicode has of dots, wide letters and invisible signs folds into ASCII."""
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return ""


def _named(environ: Mapping[str, str]) -> str:
    """The directory as it is written, before a home is in place of "~"."""
    own, base = environ.get("OCTOAI_CONFIG_DIR"), environ.get("XDG_CONFIG_HOME")
    return own or os.path.join(base or os.path.join("~", ".config"), "octoai")


def _file(environ: Mapping[str, str] | None) -> str | None:
    found = directory(environ)
    return None if found is None else os.path.join(found, _FILENAME)


def _stored_token() -> Credentials | None:
    """What is in the credentials file, if it has a token. Whoever explains an error does not raise another."""
    try:
        stored = read()
    except ConfigurationError:
        return None
    return stored if stored and stored.token else None


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    name = _first_of(environ, names)
    return name and environ[name].strip()


def _first_of(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The first of these variables that says something."""
    return next((name for name in names if environ.get(name, "").strip()), None)


def _quoted(text: str) -> str:
    """A TOML basic string."""
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ConfigurationError(message="control characters cannot be stored in the credentials file")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
