from pathlib import Path

import pytest

from octoai.server.places import cache_dir, create, data_dir


@pytest.mark.parametrize(
    ("environ", "cache", "data"),
    [
        ({"HOME": "/h"}, "/h/.cache/octoai", "/h/.local/share/octoai"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/c", "XDG_DATA_HOME": "/d"}, "/c/octoai", "/d/octoai"),
        (
            {"HOME": "/h", "XDG_CACHE_HOME": "c", "XDG_DATA_HOME": ""},
            "/h/.cache/octoai",
            "/h/.local/share/octoai",
        ),
        (
            {"HOME": "/h", "OCTOAI_CACHE_DIR": "/x", "OCTOAI_DATA_DIR": "~/y", "XDG_CACHE_HOME": "/c"},
            "/x",
            "/h/y",
        ),
    ],
)
def test_places_follow_the_environment(environ: dict[str, str], cache: str, data: str) -> None:
    assert cache_dir(environ) == Path(cache)
    assert data_dir(environ) == Path(data)


def test_a_relative_choice_becomes_absolute() -> None:
    assert cache_dir({"OCTOAI_CACHE_DIR": "weights"}) == Path.cwd() / "weights"


def test_a_new_directory_is_for_its_owner_alone_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    assert create(tmp_path / "a" / "new").stat().st_mode & 0o777 == 0o700
    old = tmp_path / "old"
    old.mkdir(mode=0o755)
    assert create(old).stat().st_mode & 0o777 == 0o755
