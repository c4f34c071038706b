"""Profiles: kept and found again, and ignored where they are not for this model, CPU and engine."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from octoai.optimizer import kernels, optimization, profile
from octoai.optimizer.optimization import Wish
from octoai.optimizer.outcome import Outcome, Trial
from octoai.optimizer.plot import plotted
from octoai.optimizer.profile import BadProfile, Profile, Profiles, is_ours_alone, sha256, sha256_of_model, this_cpu
from octoai.optimizer.space import Candidate
from octoai.optimizer.workload import Speed
from octoai.server.machine.places import create


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights as given")
    return path


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profiles:
    monkeypatch.setattr(profile, "num_cores", lambda: 2)
    return Profiles(tmp_path / "cache", cpu="a CPU, 2 cores", engine="1.2.3")


def kernels_path(profiles: Profiles) -> Path:
    return profiles.kernels_path("recipe")


def stored(
    profiles: Profiles, source: Path, made: bytes | None = b"weights in another format", kernels: bytes | None = None
) -> tuple[Profile, Path]:
    """A profile, and the directory it is in."""
    if kernels is not None:
        create(kernels_path(profiles).parent)
        kernels_path(profiles).write_bytes(kernels)
    weights = None
    if made is not None:
        weights = source.with_name("made.gguf")
        weights.write_bytes(made)
    digest = sha256(weights) if weights else None
    profile = Profile(
        model_sha256=sha256_of_model(source),
        cpu=profiles.cpu,
        engine=profiles.engine,
        candidate=Candidate("Q8_0" if made else "as given", 8, 2).tuned(
            spin_count=300, kernels=kernels_path(profiles) if kernels else None
        ),
        goal="balanced",
        max_loss=0.005,
        made="2026-11-22T23:00:00Z",
        kl_nats=0.001,
        same_top=0.99,
        ratios=(2.5, 1.3, 1.9),
        weights_file=f"{digest[:12]}.gguf" if digest else None,
        weights_bytes=len(made) if made else None,
        weights_sha256=digest,
        kernels_file=kernels_path(profiles).name if kernels else None,
        kernels_sha256=sha256(kernels_path(profiles)) if kernels else None,
    )
    return profile, profiles.store(source, profile, weights)


def test_a_profile_is_found_again_with_its_weights(profiles: Profiles, source: Path) -> None:
    profile, place = stored(profiles, source)
    assert profiles.find(source) == (profile, place / str(profile.weights_file))
    assert str(profile) == "Q8_0, 2 threads, spinning 300, 8 slots, batch 64, 1.9 x the engine's defaults"


def test_a_profile_of_the_file_as_given_serves_that_file(profiles: Profiles, source: Path) -> None:
    profile, _ = stored(profiles, source, None)
    assert profiles.find(source) == (profile, source)


def test_there_is_none_at_first(profiles: Profiles, source: Path) -> None:
    assert profiles.find(source) is None


def test_it_is_not_found_for_another_model_cpu_or_engine(profiles: Profiles, source: Path, tmp_path: Path) -> None:
    stored(profiles, source)
    assert Profiles(tmp_path / "cache", cpu="another CPU", engine="1.2.3").find(source) is None
    assert Profiles(tmp_path / "cache", cpu="a CPU, 2 cores", engine="1.2.4").find(source) is None
    source.write_bytes(b"WEIGHTS AS GIVEN")  # as long
    assert profiles.find(source) is None


def test_a_model_in_several_files_is_known_by_all_of_them(profiles: Profiles, tmp_path: Path) -> None:
    first, second = (tmp_path / f"model-0000{each}-of-00002.gguf" for each in (1, 2))
    first.write_bytes(b"names and sizes")
    second.write_bytes(b"weights")
    profile, _ = stored(profiles, first)
    assert profiles.find(first) is not None
    assert profile.model_sha256 == sha256_of_model(first) != sha256(first)
    second.write_bytes(b"WEIGHTS")
    assert profiles.find(first) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "candidate": {"num_slots": "many"}}),
    ],
)
def test_a_damaged_profile_is_one_line(profiles: Profiles, source: Path, damage: object) -> None:
    _, place = stored(profiles, source)
    path = place / "profile.json"
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with pytest.raises(BadProfile) as raised:
        profiles.find(source)
    assert "octoai optimize" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_slots", value) for value in (0, -1, 4000)),
        *(("num_threads", value) for value in (0, -2, 3)),
        *(("batch_tokens", value) for value in (0, 4096)),
        *(("num_batch_threads", value) for value in (-1, 3)),
        *(("micro_batch_tokens", value) for value in (-1, 65)),
        *(("spin_count", value) for value in (-1, 10**9)),
        ("cache_type", "q8_0"),
    ],
)
def test_what_no_search_can_choose_is_a_damaged_profile(
    profiles: Profiles, source: Path, name: str, value: int | str
) -> None:
    """One bit may make a zero of an eight, which is JSON all the same."""
    _, place = stored(profiles, source)
    said = json.loads((place / "profile.json").read_text())
    part = said["candidate"] if name in said["candidate"] else said["candidate"]["tuning"]
    assert name in part
    part[name] = value
    (place / "profile.json").write_text(json.dumps(said))
    with pytest.raises(BadProfile, match=r"^the profile of model\.gguf is damaged; the defaults are used"):
        profiles.find(source)


@pytest.mark.parametrize("content", [b"", b"weights in another format!", b"WEIGHTS in another format", None])
def test_weights_that_are_not_those_it_was_made_with_are_not_served(
    profiles: Profiles, source: Path, content: bytes | None
) -> None:
    profile, place = stored(profiles, source)
    path = place / str(profile.weights_file)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadProfile, match="not the ones"):
        profiles.find(source)


def test_kernels_are_found_again_also_in_a_cache_that_was_moved(
    profiles: Profiles, source: Path, tmp_path: Path
) -> None:
    profile, _ = stored(profiles, source, kernels=b"kernels")
    assert "compiled for this CPU" in str(profile)
    assert profiles.find(source) is not None
    assert profiles.find(source)[0] == profile  # type: ignore[index]
    moved = (tmp_path / "cache").rename(tmp_path / "moved")
    (found, _) = Profiles(moved, cpu=profiles.cpu, engine=profiles.engine).find(source) or (None, None)
    assert found is not None
    assert found.candidate.tuning.kernels == moved / "kernels" / kernels_path(profiles).name


@pytest.mark.parametrize("content", [b"", b"KERNELS", None])
def test_kernels_that_are_not_those_it_was_made_with_are_not_loaded(
    profiles: Profiles, source: Path, content: bytes | None
) -> None:
    stored(profiles, source, kernels=b"kernels")
    kernels_path(profiles).unlink()
    if content is not None:
        kernels_path(profiles).write_bytes(content)
    with pytest.raises(BadProfile, match="octoai optimize"):
        profiles.find(source)


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("is_directory", [False, True])
def test_kernels_that_others_can_write_are_not_loaded(
    profiles: Profiles, source: Path, tmp_path: Path, mode: int, is_directory: bool
) -> None:
    stored(profiles, source, kernels=b"kernels")
    path = profiles.kernels_path(kernels.RECIPE)
    path.write_bytes(b"kernels")
    for each in (path, kernels_path(profiles)):
        each.chmod(0o600)
    for each in (path.parent,) if is_directory else (path, kernels_path(profiles)):
        each.chmod(each.stat().st_mode | mode)
    with pytest.raises(BadProfile, match="others can write it"):
        profiles.find(source)
    wish = Wish(context_length=512, seconds=600)
    own, why_not = optimization._kernels(profiles, wish, 2, tmp_path / "work", pytest.fail)
    assert own is None
    assert "others can write it" in str(why_not)


def test_kernels_of_another_user_are_not_loaded(
    profiles: Profiles, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(profiles, source, kernels=b"kernels")
    path = kernels_path(profiles)
    assert is_ours_alone(path)
    if os.geteuid() == 0:  # what is root's may be loaded by anybody
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(BadProfile, match="others can write it"):
        profiles.find(source)


def test_a_profile_keeps_the_kernels_it_was_made_with_when_others_are_made(profiles: Profiles, source: Path) -> None:
    profile, _ = stored(profiles, source, kernels=b"kernels")
    profiles.kernels_path("another").write_bytes(b"others")
    assert (profiles.find(source) or [None])[0] == profile


def test_a_profile_cannot_name_kernels_elsewhere(profiles: Profiles, source: Path) -> None:
    _, place = stored(profiles, source)
    path = place / "profile.json"
    said = json.loads(path.read_text())
    said["candidate"]["tuning"]["kernels"] = "/tmp/others.so"
    path.write_text(json.dumps(said))
    found = profiles.find(source)
    assert found is not None
    assert found[0].candidate.tuning.kernels is None
    path.write_text(json.dumps({**said, "kernels_file": "../../../others.so"}))
    with pytest.raises(BadProfile, match=r"kernels/others\.so"):
        profiles.find(source)


def test_a_profile_cannot_name_a_file_elsewhere(profiles: Profiles, source: Path) -> None:
    _, place = stored(profiles, source)
    path = place / "profile.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights_file": "../../../model.gguf"}))
    with pytest.raises(BadProfile):
        profiles.find(source)


def test_a_new_profile_takes_the_place_and_the_room_of_the_old_one(profiles: Profiles, source: Path) -> None:
    _, place = stored(profiles, source)
    profile, again = stored(profiles, source, b"yet other weights")
    assert again == place
    assert {path.name for path in place.iterdir()} == {"profile.json", profile.weights_file}


def test_a_profile_is_on_the_disk_before_it_is_in_its_place(
    profiles: Profiles, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it may be there after a power cut, and empty."""
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").read_bytes()))
    _, place = stored(profiles, source)
    assert synced[-1:] == [(place / "profile.json").read_bytes()]


def test_a_newer_engine_takes_the_room_of_the_older(profiles: Profiles, source: Path, tmp_path: Path) -> None:
    _, place = stored(profiles, source, kernels=b"older")
    newer = Profiles(tmp_path / "cache", cpu=profiles.cpu, engine="1.2.4")
    stored(newer, source, kernels=b"newer")
    assert newer.find(source) is not None
    assert not place.exists()
    assert list(kernels_path(newer).parent.iterdir()) == [kernels_path(newer)]
    elsewhere = Profiles(tmp_path / "cache", cpu="another CPU", engine="1.2.4")
    stored(elsewhere, source)
    assert newer.find(source) is not None  # another machine's, in a shared cache


def test_this_cpu_is_said_in_one_line_and_always_alike() -> None:
    assert this_cpu() == this_cpu()
    assert "cores" in this_cpu()
    assert "\n" not in this_cpu()


def test_the_plot_is_a_picture_with_the_chosen_point_marked() -> None:
    chosen, other = Candidate("Q8_0"), Candidate("<Q4>")
    trials = [Trial("a", each, 0.1, Speed(100 + n, 10, 20 + n)) for n, each in enumerate((chosen, other, other))]
    trials.append(Trial("a", replace(other, num_slots=9), 0.1, note="failed"))
    root = ElementTree.fromstring(plotted(Outcome(chosen, trials=trials)))
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2
    assert [circle.get("fill") for circle in circles].count("#d4380d") == 1
    ElementTree.fromstring(plotted(Outcome(chosen)))
