"""What a machine can check of the structure: sizes, import contracts, sorted public names."""

from __future__ import annotations

import ast
import importlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_FUNCTION_LINES, MAX_FUNCTION_LINES_P95 = 60, 35
MAX_FILE_LINES, MAX_FILE_LINES_P95 = 400, 300


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def percentile_95(sizes: list[int]) -> int:
    return sorted(sizes)[int(len(sizes) * 0.95)]


def test_functions_are_small() -> None:
    sizes = dict(entry for path in SOURCES for entry in functions(path))
    assert {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES} == {}
    assert percentile_95(list(sizes.values())) <= MAX_FUNCTION_LINES_P95


def test_files_are_small() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES} == {}
    assert percentile_95(list(sizes.values())) <= MAX_FILE_LINES_P95


def interpreters(path: Path) -> Iterator[tuple[str, str]]:
    """Where one of ours is started, and what it is given first."""
    for node in ast.walk(ast.parse(path.read_text())):
        arguments = node.elts if isinstance(node, ast.List | ast.Tuple) else []
        for program, first in itertools.pairwise(map(ast.unparse, arguments)):
            if program == "sys.executable":
                yield f"{path.relative_to(ROOT)}:{node.lineno}", first


def test_no_process_of_ours_takes_code_from_where_it_is_started() -> None:
    """Without `-P` Python looks there first, for a `json.py` as well."""
    started = dict(entry for path in SOURCES for entry in interpreters(path))
    assert len(started) >= 9
    assert {place: first for place, first in started.items() if first != "'-P'"} == {}


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path) for path in SOURCES if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_layers_hold_and_there_are_no_cycles() -> None:
    ran = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout


def test_no_test_is_the_helper_of_another() -> None:
    imported = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.module}"
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2].startswith("test_")
    ]
    assert imported == []


@pytest.mark.parametrize("name", ["octoai", "octoai.core", "octoai.text_gen", "octoai.text_gen.types", "octoai.client"])
def test_public_names_are_sorted_and_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None
