"""llama.cpp computes with kernels of our choice instead of those that its wheel was built with.

What the wheel carries runs on any processor of the last ten years, and so without what a newer one has beside. Kernels
that were compiled for the processor at hand are a library of their own, one of ggml's "backends": `ggml_backend_load`
is how llama.cpp itself takes them, where it was not linked with its only ones. With them come samplers and what gives a
beginning to several slots, which take the place of the wheel's. Only called in child processes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import stat
from pathlib import Path

_CALLS_VERSION = 2
"""Of the calls in kernels that may take the place of the wheel's, at least."""


NO_KERNELS = os.EX_CONFIG
"""The exit status of a process that cannot load them."""
FOR_KERNELS = (NO_KERNELS, *(-each for each in (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)))
"""What a process that cannot run them ends with; everything else has other reasons, which may be gone later."""


class CannotLoadKernels(Exception):
    """The text is one line that says why."""


def load(path: Path) -> None:
    """From now on this process computes with the kernels in that file, made from the source of the very wheel that is
    installed. Must be called before a model is loaded. Raises CannotLoadKernels; the wheel's stay then. It is the very
    file that was looked at which is loaded: in a cache that others can write, another may be there at any moment."""
    wheel = importlib.util.find_spec("xllamacpp.xllamacpp")
    if wheel is None or wheel.origin is None:
        raise CannotLoadKernels("xllamacpp is missing: pip install 'octoai[server]>=1.12'")
    # Globally: what kernels call of ggml is found in the wheel.
    ggml = ctypes.CDLL(wheel.origin, ctypes.RTLD_GLOBAL)
    for name in ("ggml_backend_reg_by_name", "ggml_backend_load"):
        getattr(ggml, name).restype = ctypes.c_void_p
    ggml.ggml_backend_unload.argtypes = [ctypes.c_void_p]
    shipped = ggml.ggml_backend_reg_by_name(b"CPU")
    not_kernels = CannotLoadKernels(f"{path} is not a library of kernels for this llama.cpp")
    try:
        file = path.open("rb")
    except OSError:
        raise not_kernels from None
    with file:
        status, opened = os.fstat(file.fileno()), f"/proc/self/fd/{file.fileno()}"
        if status.st_uid not in {os.geteuid(), 0} or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CannotLoadKernels(f"{path} is not loaded: others can write it")
        if not ggml.ggml_backend_load(opened.encode()):
            raise not_kernels
        ggml.ggml_backend_unload(shipped)  # what is left is what is used
        kernels = ctypes.CDLL(opened)
    # A profile may name kernels that an earlier version made: they compute what they should, but took a text apart
    # as the longer one that it begins.
    if hasattr(kernels, "calls_version") and kernels.calls_version() >= _CALLS_VERSION:
        kernels.replace_calls()
