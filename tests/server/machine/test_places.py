from pathlib import Path

import pytest

from octoai.server.machine.places import NOWHERE, cache_dir, create, data_dir
from octoai.server.settings import BadSettings, load


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


@pytest.mark.usefixtures("homeless")
def test_without_a_home_there_is_only_what_is_said_in_full() -> None:
    assert (cache_dir({}), data_dir({})) == (NOWHERE, NOWHERE)
    assert data_dir({"OCTOAI_DATA_DIR": "~/d"}) == NOWHERE
    assert data_dir({"OCTOAI_DATA_DIR": "/d"}) == Path("/d")
    assert data_dir({"XDG_DATA_HOME": "/x"}) == Path("/x/octoai")
    with pytest.raises(NotADirectoryError):
        create(NOWHERE)


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("said_in", ["nowhere", "file", "option"])
def test_who_has_no_home_is_told_which_variable_to_set_once_it_is_needed(tmp_path: Path, said_in: str) -> None:
    file = tmp_path / "octoai.toml"
    file.write_text('cache_dir = "cache"\n' + ('data_dir = "~/d"\n' if said_in == "file" else ""))
    overrides = {"data_dir": Path("~/d")} if said_in == "option" else {}
    settings = load(path=file, environ={}, overrides=overrides)
    assert settings.cache == tmp_path / "cache"
    with pytest.raises(BadSettings, match=r"^this user has no home directory: set OCTOAI_DATA_DIR to "):
        _ = settings.place
    with pytest.raises(BadSettings, match="OCTOAI_CACHE_DIR"):
        _ = load(path=None, environ={"OCTOAI_DATA_DIR": "/d"}).cache
