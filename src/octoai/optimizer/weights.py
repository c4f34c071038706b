"""The same weights in other formats: which there are for a file, and a file made over into one of them.

A `Recipe` says which tensors get which format. `requantize` follows it piece by piece, so that memory is bounded by a
few pieces whatever the file's size, and writes all or nothing. Knows nothing of speed or quality: others measure that.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from octoai.optimizer.affine import as_q8_0, is_affine
from octoai.optimizer.ggml import BadFile, Format, Header, Tensor, can_read, converted, formats, open_header
from octoai.server.machine.cores import num_cores
from octoai.server.machine.places import lack_of_space

Progress = Callable[[int, int], None]
"""Called with the bytes written and the bytes in all, from one thread at a time."""

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
FEED_FORWARD = "blk.*.ffn_*.weight"

_MATRICES = re.compile(
    r"token_embd\.weight|output\.weight|"
    r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(up|down|gate|gate_up)(_exps|_shexp)?)\.weight"
)
"""What is requantized: the large matrices of which every model has most of its weights. Norms, biases, routers and
what only some architectures have stay as they are."""

_PIECE_NUMBERS = 1 << 20  # 4 MiB as floats
_FILE_TYPES = {  # of llama_ftype: what most of the weights are
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12},
    **{"Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "MXFP4": 38},
}


class UnusableWeights(Exception):
    """Weights that cannot be made over; the text is one line that says why and what to do next."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which tensors get which format: pairs of a pattern of names and a format. The first pair counts whose pattern
    fits the name and whose blocks fit the tensor's rows; a tensor that no pair is for stays as it is."""

    name: str
    rules: tuple[tuple[str, str], ...]

    def format_of(self, tensor: Tensor) -> Format:
        if not _MATRICES.fullmatch(tensor.name):
            return tensor.format
        fitting = (
            formats()[name]
            for pattern, name in self.rules
            if fnmatchcase(tensor.name, pattern) and tensor.shape[0] % formats()[name].block_length == 0
        )
        return next(fitting, tensor.format)


UNCHANGED = Recipe("as given", ())  # the name that `space` has for it

_FINE_EMBEDDING = ((EMBEDDING, "Q8_0"), (OUTPUT, "Q8_0"))
_CANDIDATES = (
    Recipe("Q8_0", (("*", "Q8_0"),)),
    Recipe("feed-forward IQ4_NL, rest Q8_0", ((FEED_FORWARD, "IQ4_NL"), ("*", "Q8_0"))),
    Recipe("Q4_K or IQ4_NL, embedding Q8_0", (*_FINE_EMBEDDING, ("*", "Q4_K"), ("*", "IQ4_NL"))),
    Recipe("Q4_1, embedding Q8_0", (*_FINE_EMBEDDING, ("*", "Q4_1"))),
    Recipe("IQ4_NL, embedding Q8_0", (*_FINE_EMBEDDING, ("*", "IQ4_NL"))),
    Recipe("Q4_0, embedding Q8_0", (*_FINE_EMBEDDING, ("*", "Q4_0"))),
    Recipe("Q4_K or IQ4_NL", (("*", "Q4_K"), ("*", "IQ4_NL"))),
    Recipe("Q4_0", (("*", "Q4_0"),)),
)
"""From little loss to much. What the kernels run fast differs from one CPU to another, so it is not guessed here."""


def recipes(source: Path) -> list[Recipe]:
    """Those that would change this file, each to something different, and `UNCHANGED` first. Raises UnusableWeights."""
    tensors = _tensors(source)
    found = {tuple(each.format for each in tensors): UNCHANGED}
    for recipe in _CANDIDATES:
        found.setdefault(tuple(recipe.format_of(each) for each in tensors), recipe)
    return list(found.values())


def is_changed(source: Path, recipe: Recipe) -> bool:
    """Whether the recipe makes another file of this one. Raises UnusableWeights."""
    return any(recipe.format_of(each) != each.format for each in _tensors(source))


def num_bytes(source: Path, recipe: Recipe) -> int:
    """How large the tensors of the file become. Raises UnusableWeights."""
    return sum(recipe.format_of(each).num_bytes(each.num_numbers) for each in _tensors(source))


def requantize(
    source: Path, target: Path, recipe: Recipe, *, num_threads: int = 0, on_progress: Progress | None = None
) -> None:
    """Write `source` to `target` as `recipe` says, with all its metadata; a model in several files (`…-00001-of-…`)
    becomes one. `target` is there whole, or not at all. Raises UnusableWeights."""
    with ExitStack() as stack:
        sources = [_Source(path, stack) for path in _parts(source)]
        plan = _plan(sources, recipe)
        require_space(target.parent, plan.num_bytes)
        try:
            _write(plan, target, num_threads or num_cores(), on_progress or _no_progress)
        except OSError as error:
            raise UnusableWeights(f"cannot write {target}: {error.strerror or error}") from None


class _Source:
    """A file of weights, open until the stack is left."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        try:
            self.header = stack.enter_context(open_header(path))
        except BadFile as error:
            raise UnusableWeights(str(error)) from None
        self.tensors = self.header.tensors()
        self.file = stack.enter_context(path.open("rb", buffering=0))

    def read(self, offset: int, num_bytes: int) -> bytearray:
        buffer = bytearray(num_bytes)
        if os.preadv(self.file.fileno(), [buffer], offset) != num_bytes:
            raise UnusableWeights(f"{self.path} is cut off: fetch it again")
        return buffer


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some whole rows of a tensor: where they are, and where they go."""

    source: _Source
    tensor: Tensor
    first: int
    """The number that it begins with."""
    num_numbers: int
    to: Format
    target_offset: int

    def copy(self, target: int) -> int:
        """Returns how many bytes were written."""
        start = self.tensor.format
        rows = self.source.read(self.tensor.offset + start.num_bytes(self.first), start.num_bytes(self.num_numbers))
        if self.to.name == "Q8_0" and is_affine(start.name):
            made = memoryview(as_q8_0(rows, start.name))
        else:
            made = memoryview(converted(rows, start, self.to, self.tensor.shape[0]))
        offset = self.target_offset + self.to.num_bytes(self.first)
        done = 0
        while done < len(made):
            done += os.pwrite(target, made[done:], offset + done)
        return done


@dataclass(frozen=True, slots=True)
class _Plan:
    header: bytes
    pieces: list[_Piece]
    num_bytes: int


def _plan(sources: list[_Source], recipe: Recipe) -> _Plan:
    """Changes the first header to what the target's is."""
    header = sources[0].header
    for source in sources[1:]:
        header.append(source.header)
    given = [(source, tensor) for source in sources for tensor in source.tensors]
    for _, tensor in given:
        to = recipe.format_of(tensor)
        if to != tensor.format:
            _require_readable(tensor)
            header.set_format(tensor, to)
    if len(sources) > 1:
        header.set_number("split.count", 0, bits=16)
    made = header.tensors(begin=0)
    _correct_file_type(header, made)
    start = header.written()
    pieces = [
        piece
        for (source, tensor), target in zip(given, made, strict=True)
        for piece in _pieces(source, tensor, target.format, len(start) + target.offset)
    ]
    alignment = header.number("general.alignment", 32)
    end = max(each.offset + each.num_bytes for each in made)
    return _Plan(start, pieces, len(start) + -(-end // alignment) * alignment)


def _pieces(source: _Source, tensor: Tensor, to: Format, target_offset: int) -> Iterator[_Piece]:
    row_length = max(1, tensor.shape[0])
    step = max(1, _PIECE_NUMBERS // row_length) * row_length
    for first in range(0, tensor.num_numbers, step):
        yield _Piece(source, tensor, first, min(step, tensor.num_numbers - first), to, target_offset)


def _require_readable(tensor: Tensor) -> None:
    if not can_read(tensor.format.name):
        raise UnusableWeights(
            f"{tensor.name} is in {tensor.format.name}, which llama.cpp cannot turn into another format"
        )


def _correct_file_type(header: Header, made: list[Tensor]) -> None:
    """What the file says that it is: the format of most of its weights."""
    numbers: dict[str, int] = {}
    for each in made:
        numbers[each.format.name] = numbers.get(each.format.name, 0) + each.num_numbers
    most = max(numbers, key=lambda name: numbers[name])
    if most in _FILE_TYPES and header.number("general.file_type", -1) != _FILE_TYPES[most]:
        header.set_number("general.file_type", _FILE_TYPES[most])


def _write(plan: _Plan, target: Path, num_threads: int, on_progress: Progress) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    part = Path(name)
    try:
        try:
            _fill(descriptor, plan, num_threads, on_progress)
        finally:
            os.close(descriptor)
        part.replace(target)
    except BaseException:  # Ctrl-C too: nothing of it is left
        with suppress(FileNotFoundError):
            part.unlink()
        raise


def _fill(descriptor: int, plan: _Plan, num_threads: int, on_progress: Progress) -> None:
    os.truncate(descriptor, plan.num_bytes)
    done = os.pwrite(descriptor, plan.header, 0)
    with ThreadPoolExecutor(num_threads) as executor:  # the library's work needs no interpreter
        for num_bytes in executor.map(lambda piece: piece.copy(descriptor), plan.pieces):
            done += num_bytes
            on_progress(done, plan.num_bytes)
    os.fsync(descriptor)
    os.fchmod(descriptor, 0o644)


def _parts(source: Path) -> list[Path]:
    """The files that the model is in, the first one given."""
    try:
        with open_header(source) as header:
            count = header.number("split.count")
            position = header.number("split.no")
    except BadFile as error:
        raise UnusableWeights(str(error)) from None
    if count <= 1:
        return [source]
    ending = f"-{1:05d}-of-{count:05d}.gguf"
    if position != 0 or not source.name.endswith(ending):
        raise UnusableWeights(f"{source} is one file of {count}: name the first one, which ends in {ending}")
    prefix = source.name.removesuffix(ending)
    return [source.with_name(f"{prefix}-{each:05d}-of-{count:05d}.gguf") for each in range(1, count + 1)]


def _tensors(source: Path) -> list[Tensor]:
    with ExitStack() as stack:
        return [tensor for path in _parts(source) for tensor in _Source(path, stack).tensors]


def require_space(directory: Path, num_bytes: int) -> None:
    """Raises UnusableWeights."""
    try:
        lack = lack_of_space(directory, num_bytes)
    except OSError as error:
        raise UnusableWeights(f"cannot write to {directory}: {error.strerror}") from None
    if lack is not None:
        raise UnusableWeights(lack)


def _no_progress(_done: int, _total: int) -> None:
    return None
