"""ggml with kernels that were compiled, for the tests of them. In a process of its own, since kernels stay loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octoai.server.engines.llama import kernels

F32, F16 = 0, 1


class _Parameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Loaded:
    """Handles are numbers."""

    def __init__(self, path: Path) -> None:
        kernels.load(path)
        wheel = find_spec("xllamacpp.xllamacpp")
        assert wheel is not None and wheel.origin is not None
        self._library = ctypes.CDLL(wheel.origin)
        self._registered = self.call("ggml_backend_reg_by_name", b"CPU")
        self.device = self.call("ggml_backend_reg_dev_get", self._registered, ctypes.c_size_t(0))
        self._backend = self.call("ggml_backend_dev_init", self.device, None)

    def call(self, name: str, *arguments: Any) -> int:
        return self._called(getattr(self._library, name), arguments)

    def call_registered(self, name: bytes, *arguments: Any) -> int:
        """A function that only the backend itself knows."""
        place = self.call("ggml_backend_reg_get_proc_address", self._registered, name)
        kinds = [ctypes.c_void_p if type(each) is int else type(each) for each in arguments]
        return self._called(ctypes.CFUNCTYPE(ctypes.c_void_p, *kinds)(place), arguments)

    def _called(self, function: Any, arguments: tuple[Any, ...]) -> int:
        function.restype = ctypes.c_void_p
        return function(*(ctypes.c_void_p(each) if type(each) is int else each for each in arguments)) or 0

    def set_threads(self, number: int) -> None:
        self.call_registered(b"ggml_backend_set_n_threads", self._backend, ctypes.c_int(number))

    @contextmanager
    def context(self, num_bytes: int, *, is_empty: bool = False) -> Iterator[int]:
        """`is_empty`: tensors have no place of their own there."""
        made = self.call("ggml_init", _Parameters(num_bytes + (1 << 22), None, is_empty))
        try:
            yield made
        finally:
            self.call("ggml_free", made)

    def tensor(self, context: int, kind: int, values: NDArray[Any]) -> int:
        """Of these values, whose last dimension is ggml's first."""
        sizes = [ctypes.c_int64(size) for size in reversed(values.shape)]
        sizes += [ctypes.c_int64(1)] * (4 - len(sizes))
        made = self.call("ggml_new_tensor_4d", context, ctypes.c_int(kind), *sizes)
        self.fill(made, np.asarray(values, dtype=np.float32 if kind == F32 else np.float16))
        return made

    def fill(self, tensor: int, values: NDArray[Any]) -> None:
        """With values of its type."""
        kept = np.ascontiguousarray(values)
        ctypes.memmove(self.call("ggml_get_data", tensor), kept.ctypes.data, kept.nbytes)

    def computed(self, context: int, out: int, shape: tuple[int, ...], num_threads: int) -> NDArray[Any]:
        return self.all_computed(context, [out], shape, num_threads)[0]

    def all_computed(
        self, context: int, outs: Sequence[int], shape: tuple[int, ...], num_threads: int
    ) -> list[NDArray[Any]]:
        """Of one graph."""
        graph = self.call("ggml_new_graph", context)
        for out in outs:
            self.call("ggml_build_forward_expand", graph, out)
        self.set_threads(num_threads)
        assert self.call("ggml_backend_graph_compute", self._backend, graph) == 0
        found = [np.empty(shape, np.float32) for _ in outs]
        for out, values in zip(outs, found, strict=True):
            ctypes.memmove(values.ctypes.data, self.call("ggml_get_data", out), values.nbytes)
        return found
