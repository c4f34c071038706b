"""`make demo`: start the service, run the two samples of OctoAI's SDK unchanged, say what they used, stop.

Everything it keeps is in `.demo/` of this checkout; only the model goes to the usual cache.
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
START_SECONDS = 300


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="octoai-demo-") as place:
        environment = {**os.environ, "OCTOAI_CONFIG_DIR": f"{place}/config", "OCTOAI_DATA_DIR": f"{place}/data"}
        log = Path(place, "requests.log")
        with log.open("wb") as requests:
            # The progress bar of the download is on standard error, where the requests are logged later.
            subprocess.run(
                [sys.executable, "-m", "octoai", "pull", "smollm2-135m-instruct"], check=True, stdout=subprocess.DEVNULL
            )
            command = [sys.executable, "-m", "octoai", "serve", "--port", "0"]
            service = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=requests, text=True)
            try:
                return demonstrate(service, environment, log)
            finally:
                service.terminate()
                service.wait(timeout=60)


def demonstrate(service: subprocess.Popen[str], environment: dict[str, str], log: Path) -> int:
    url = until_ready(service)
    credentials = tomllib.loads(Path(environment["OCTOAI_CONFIG_DIR"], "credentials.toml").read_text())
    environment = {**environment, "OCTOAI_BASE_URL": url, "OCTOAI_TOKEN": credentials["token"]}
    for name in ("chat.py", "chat_stream.py"):
        print(f"\n--- examples/{name} " + "-" * 60, flush=True)
        began = time.perf_counter()
        subprocess.run([sys.executable, str(HERE / name)], env=environment, check=True)
        print(f"\n({time.perf_counter() - began:.1f} s)", flush=True)
    print("\n--- what they used " + "-" * 60)
    for line in log.read_text().splitlines():
        request = json.loads(line)
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
    raise SystemExit(f"the service did not start (exit status {service.wait()})")


if __name__ == "__main__":
    raise SystemExit(main())
