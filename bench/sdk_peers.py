"""The SDKs that are measured, and an environment for each: ours from this checkout, the peers at pinned versions.

The environments are kept in `bench/.venvs/`, with a note of what they were made from; a change makes them anew. They
are apart from each other because octoai 1.11 and ours share an import name, and the others their dependencies.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
import venv
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).parent
CHECKOUT = BENCH.parent
VENVS = BENCH / ".venvs"


@dataclass(frozen=True)
class Peer:
    """What a fresh process runs: the import, the import and a client that can be called, and a first answer.

    `ready` and `answer` go on from `load`; `{url}` is where the loopback server is.
    """

    name: str
    load: str
    ready: str
    answer: str
    optional: bool = False

    @property
    def python(self) -> Path:
        return VENVS / self.name / "bin" / "python"

    def program(self, stage: str, url: str) -> str:
        """What is timed, as a program; that of a first answer fails unless the answer is the right one."""
        if stage == "import":
            return self.load
        lines = f"{self.load}\n{self.ready}" if stage == "client" else f"{self.load}\n{textwrap.dedent(self.answer)}"
        return lines.replace("{url}", url)


_ASK = 'model="bench", messages=[{"role": "user", "content": "Write a blog about Seattle"}]'
_RIGHT = 'assert text.startswith("The rain in Seattle") and len(text) == 600, text'


def _openai_shaped(name: str, client: str, suffix: str) -> Peer:
    make = f'client = {name}.{client}(api_key="bench", base_url="{{url}}{suffix}")'
    ask = f"text = client.chat.completions.create({_ASK}, max_tokens=150).choices[0].message.content"
    return Peer(name, f"import {name}", f"{make}\nclient.chat.completions", f"{make}\n{ask}\n{_RIGHT}")


def _octoai(name: str, where: str) -> Peer:
    answer = f"""\
        from octoai.client import OctoAI
        from octoai.text_gen import ChatMessage
        {where}
        ask = client.text_gen.create_chat_completion
        question = [ChatMessage(role="user", content="Write a blog about Seattle")]
        text = ask(model="bench", messages=question, max_tokens=150).choices[0].message.content
        {_RIGHT}"""
    return Peer(name, "import octoai", "from octoai.client import OctoAI; OctoAI()", answer)


PEERS = [
    _octoai("ours", 'client = OctoAI(api_key="bench", base_url="{url}")'),
    _octoai(
        "octoai",
        "from octoai.environment import OctoAIEnvironment as At; "
        'at = At(default="{url}", image_gen="{url}", text_gen="{url}"); '
        'client = OctoAI(api_key="bench", environment=at)',
    ),
    _openai_shaped("openai", "OpenAI", "/v1"),
    _openai_shaped("groq", "Groq", ""),
    _openai_shaped("together", "Together", "/v1"),
    Peer(
        "anthropic",
        "import anthropic",
        'anthropic.Anthropic(api_key="bench").messages',
        f"""\
        client = anthropic.Anthropic(api_key="bench", base_url="{{url}}")
        text = client.messages.create({_ASK}, max_tokens=150).content[0].text
        {_RIGHT}""",
    ),
    Peer(
        "ollama",
        "import ollama",
        "ollama.Client()",
        f"""\
        text = ollama.Client(host="{{url}}").chat({_ASK}).message.content
        {_RIGHT}""",
    ),
    Peer(
        "mistralai",
        "from mistralai.client import Mistral",
        'Mistral(api_key="bench").chat',
        f"""\
        text = Mistral(api_key="bench", server_url="{{url}}").chat.complete({_ASK}).choices[0].message.content
        {_RIGHT}""",
        optional=True,
    ),
]


# ---- environments ----


def _made_from(peer: Peer) -> str:
    """A digest of what the environment holds: our sources, or the peer's pinned requirements."""
    if peer.name == "ours":
        paths = [CHECKOUT / "pyproject.toml", *sorted((CHECKOUT / "src").rglob("*.py"))]
    else:
        paths = [BENCH / "peers" / f"{peer.name}.txt"]
    digest = hashlib.sha256(sys.version.encode())
    for path in paths:
        digest.update(f"{path.relative_to(CHECKOUT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _installer(python: Path) -> list[str]:
    """uv where it is at hand, which is quicker; else pip."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv:
        return [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python)]
    return [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]


def prepare(peer: Peer) -> None:
    """Makes the environment, unless it stands already."""
    note = VENVS / peer.name / "made-from"
    wanted = _made_from(peer)
    if note.exists() and note.read_text() == wanted:
        return
    print(f"setting up {note.parent.relative_to(CHECKOUT)} …", file=sys.stderr)
    shutil.rmtree(note.parent, ignore_errors=True)
    venv.create(note.parent, with_pip=False)
    what = [str(CHECKOUT)] if peer.name == "ours" else ["-r", str(BENCH / "peers" / f"{peer.name}.txt")]
    subprocess.run([*_installer(peer.python), *what], check=True)
    note.write_text(wanted)


_LIST = (
    "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
)


def distributions(peer: Peer) -> dict[str, str]:
    """What is installed, by name: the SDK and all it needs, and nothing else."""
    listed = subprocess.run([str(peer.python), "-I", "-c", _LIST], check=True, capture_output=True)
    return dict(json.loads(listed.stdout))
