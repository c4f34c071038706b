"""`make demo`: start the service, run the two samples of OctoAI's SDK unchanged, say what they used, stop.

Everything it keeps is in a directory that is removed at its end; only the model goes to the usual cache.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).parent


class DemoFailed(Exception):
    """The text is one line."""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="octoai-demo-") as place:
        environment = {**own_environment(), "OCTOAI_CONFIG_DIR": f"{place}/config", "OCTOAI_DATA_DIR": f"{place}/data"}
        # The progress bar of the download is on standard error, where the service logs its requests later.
        pull = [sys.executable, "-m", "octoai", "pull", "smollm2-135m-instruct"]
        if subprocess.run(pull, env=environment, check=False, stdout=subprocess.DEVNULL).returncode != 0:
            return 1
        log = Path(place, "requests.log")
        with log.open("wb") as requests:
            command = [sys.executable, "-m", "octoai", "serve", "--port", "0"]
            service = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=requests, text=True)
        try:
            return demonstrate(service, environment, log)
        except DemoFailed as error:
            print(f"{error}; the service's last lines:", *last_lines(log), sep="\n", file=sys.stderr)
            return 1
        finally:
            service.terminate()
            service.wait(timeout=60)


def own_environment() -> dict[str, str]:
    """What is said of another service says nothing of this one."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OCTOAI_") or name == "OCTOAI_CACHE_DIR"
    }


def last_lines(log: Path) -> list[str]:
    return log.read_text().splitlines()[-10:]


def demonstrate(service: subprocess.Popen[str], environment: dict[str, str], log: Path) -> int:
    url = until_ready(service)
    credentials = tomllib.loads(Path(environment["OCTOAI_CONFIG_DIR"], "credentials.toml").read_text())
    environment = {**environment, "OCTOAI_BASE_URL": url, "OCTOAI_TOKEN": credentials["token"]}
    for name in ("chat.py", "chat_stream.py"):
        print(f"\n--- examples/{name} " + "-" * 60, flush=True)
        began = time.perf_counter()
        status = subprocess.run([sys.executable, str(HERE / name)], env=environment, check=False).returncode
        if status != 0:
            raise DemoFailed(f"examples/{name} failed (exit status {status})")
        print(f"\n({time.perf_counter() - began:.1f} s)", flush=True)
    print("\n--- what they used " + "-" * 60)
    for line in log.read_text().splitlines():
        request = json.loads(line) if line.startswith("{") else {}
        if request.get("message") == "request":
            print(
                f"{request['request_id']}: {request['model']} (served by {request['served_model']}), "
                f"{request['prompt_tokens']} prompt + {request['completion_tokens']} completion tokens, "
                f"first token after {request['first_token_ms']:.0f} ms, {request['total_ms']:.0f} ms in all"
            )
    return 0


def until_ready(service: subprocess.Popen[str]) -> str:
    assert service.stdout is not None
    for line in service.stdout:
        if "token, shown once" not in line:
            print(line, end="", flush=True)
        ready = re.match(r"octoai ready on (\S+)", line)
        if ready:
            return ready[1]
    raise DemoFailed(f"the service did not start (exit status {service.wait()})")


if __name__ == "__main__":
    raise SystemExit(main())
