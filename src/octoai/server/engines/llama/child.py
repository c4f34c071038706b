"""The child process that runs llama.cpp's own server: `python -m octoai.server.engines.llama.child`.

Reads one line of JSON from its standard input (`ChildOptions`), serves on a unix socket, prints one line when it
answers, and lives until its standard input ends or its parent does: however that dies, SIGKILL included, the child
goes, and takes its socket with it. Knows nothing of the service.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from octoai.server.engines.llama import company, kernels
from octoai.server.machine.parent import die_with_parent

_BRIEFLY = "300"  # looks, where nobody tells of company: some microseconds


def main() -> None:
    die_with_parent()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # sent to a group; the service decides when we go
        signal.signal(number, signal.SIG_IGN)
    options = json.loads(sys.stdin.readline())
    if options["gives_way"] and not company.is_visible():
        os.environ.setdefault("GOMP_SPINCOUNT", _BRIEFLY)  # before the library is loaded, which reads it then
    if options["kernels"]:
        try:
            kernels.load(Path(options["kernels"]))
        except kernels.CannotLoadKernels as error:
            print(error, file=sys.stderr)
            sys.exit(kernels.NO_KERNELS)
    server = _serve(options)
    if options["gives_way"]:
        _give_way(max(options["num_threads"], options["num_batch_threads"]))
    signal.signal(signal.SIGUSR1, lambda *_: _leave(options["socket"]))
    die_with_parent(signal.SIGUSR1)  # or we were killed before we had read that our input has ended
    print(json.dumps({"listening": server.listening_address}), flush=True)
    os.dup2(2, 1)  # nobody reads standard output after this line, and a full pipe would stop us
    sys.stdin.read()
    _leave(options["socket"])


def _leave(socket: str) -> NoReturn:
    shutil.rmtree(os.path.dirname(socket), ignore_errors=True)  # the parent may be faster
    # The engine's threads do not stop in the middle of a batch; there is nothing to save.
    os._exit(0)


def _serve(options: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options["model_path"]
    params.model_alias = {options["model"]}
    params.hostnames = [options["socket"]]
    params.api_keys = [options["key"]]
    params.ui = False
    params.endpoint_slots = True
    params.n_parallel = options["num_slots"]
    params.n_ctx = options["context_length"] * options["num_slots"]
    params.n_batch = options["batch_tokens"]
    params.n_ubatch = options["micro_batch_tokens"] or options["batch_tokens"]
    os.umask(0o077)  # what it saves has prompts in it
    params.slot_save_path = options["save_path"]
    params.n_threads_http = options["num_slots"] + 8
    params.cpuparams.n_threads = options["num_threads"]
    params.cpuparams_batch.n_threads = options["num_batch_threads"] or options["num_threads"]
    params.ctx_shift = False  # never drop the beginning of a conversation silently
    params.cache_ram_mib = options["cache_ram_mib"]
    params.sse_ping_interval = -1
    params.verbosity = 1
    _tune(xllamacpp, params, options)
    return xllamacpp.Server(params)


def _tune(xllamacpp: Any, params: Any, options: dict[str, Any]) -> None:
    attention = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}[options["flash_attention"]]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{attention}"]
    cache_type = xllamacpp.ggml_type[f"GGML_TYPE_{options['cache_type'].upper()}"]
    params.cache_type_k = params.cache_type_v = cache_type
    params.kv_unified = options["is_unified"]
    if options["is_unified"]:  # or one slot could take the room of all
        params.kv_unified_per_slot = options["context_length"]
    speculation = f"COMMON_SPECULATIVE_TYPE_{options['speculation'].upper()}"
    params.speculative.types = [xllamacpp.common_speculative_type[speculation]]


def _give_way(num_threads: int) -> None:
    from xllamacpp import xllamacpp

    company.watch(ctypes.CDLL(xllamacpp.__file__), num_threads)


if __name__ == "__main__":
    main()
