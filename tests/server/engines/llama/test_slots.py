"""Which slot a prompt goes to; and where beginnings of prompts are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.server.engines.llama.prefixes import Prefixes, fingerprint, parts
from octoai.server.engines.llama.slots import Slots, num_common, packed

LONG = packed(range(1000, 1400))


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_what_two_prompts_have_in_common_is_counted_in_tokens(one: list[int], other: list[int]) -> None:
    same = [mine == its for mine, its in zip(one, other, strict=False)]
    assert num_common(packed(one), packed(other)) == [*same, False].index(False)


def test_a_number_that_is_no_token_is_not_packed() -> None:
    for wrong in (-1, 2**32):
        with pytest.raises(OverflowError):
            packed([wrong])


def test_a_conversation_goes_to_its_own_slot_and_a_new_one_to_the_slot_unused_for_longest() -> None:
    slots = Slots(3)
    for each in range(3):
        assert slots.take(packed([each] * 10), 0) == (each, 0)
    for each in (1, 0, 2):
        slots.put_back(each, packed([each] * 10))
    assert slots.take(packed([0] * 10 + [5]), 0) == (0, 10)
    assert slots.take(packed([7, 8]), 0) == (1, 0)


def test_a_slot_that_holds_much_more_than_what_is_shared_is_left_to_its_conversation() -> None:
    slots = Slots(2)
    slot, _ = slots.take(LONG, 0)
    slots.put_back(slot, LONG)
    assert slots.take(LONG[:400] + packed([1, 2]), 0) == (1, 0)


def test_a_slot_is_not_chosen_for_what_any_slot_can_have() -> None:
    slots = Slots(2)
    slot, _ = slots.take(LONG, 0)
    slots.put_back(slot, LONG)
    other = LONG[:1200] + packed([1, 2])
    assert slots.take(other, 300) == (1, 0)
    assert slots.take(other, 300) == (0, 300)


def test_who_comes_while_others_are_served_gets_the_slot_beside_theirs() -> None:
    slots = Slots(6)
    assert [slots.take(packed([each]), 0)[0] for each in range(4)] == [0, 1, 2, 3]
    for each in (1, 0, 3):
        slots.put_back(each, packed([each]))
    assert slots.take(packed([9]), 0) == (1, 0)  # beside 2, and unused for longer than 3
    assert slots.take(packed([9]), 0) == (0, 0)
    slots.put_back(2, packed([2]))
    assert slots.take(packed([9]), 0) == (2, 0)


def test_what_would_take_long_to_read_again_is_left_alone_while_there_is_other() -> None:
    slots = Slots(6)
    assert [slots.take(packed([each]), 0)[0] for each in range(6)] == [0, 1, 2, 3, 4, 5]
    for each in (5, 1, 0):
        slots.put_back(each, LONG if each == 1 else packed([each]))
    assert slots.take(packed([9]), 0) == (5, 0)
    assert slots.take(packed([9]), 0) == (0, 0)
    assert slots.take(packed([9]), 0) == (1, 0)
    for each in (2, 1, 3):
        slots.put_back(each, LONG, 300)  # most of it can be had for any slot
    assert slots.take(packed([9]), 0) == (1, 0)


def test_of_what_would_take_long_to_read_again_the_younger_half_is_left_alone() -> None:
    slots = Slots(5)
    assert [slots.take(packed([each]), 0)[0] for each in range(5)] == [0, 1, 2, 3, 4]
    for each in (0, 2, 3):
        slots.put_back(each, LONG + packed([each]))
    assert slots.take(packed([9]), 0) == (0, 0)  # beside 1 as 2 is, and unused for longer
    assert slots.take(packed([9]), 0) == (2, 0)
    assert slots.take(packed([9]), 0) == (3, 0)


@given(st.lists(st.integers(0, 7) | st.tuples(st.integers(0, 500), st.integers(0, 500)), max_size=60))
def test_a_slot_is_never_out_twice(acts: list[int | tuple[int, int]]) -> None:
    slots, out = Slots(4), []
    for act in acts:
        if isinstance(act, int):
            if act < len(out):
                slots.put_back(out.pop(act), packed([act] * 300))
        elif len(out) < 4:
            slot, num_common = slots.take(packed([act[0]] * act[1]), 0)
            assert slot in range(4)
            assert slot not in out
            assert 0 <= num_common <= act[1]
            out.append(slot)
        assert slots.num_taken == len(out)


def write(prefixes: Prefixes, prefix: bytes, num_bytes: int, at: float) -> None:
    unfinished = prefixes.unfinished()
    (prefixes.directory / unfinished).write_bytes(b"x" * num_bytes)
    os.utime(prefixes.directory / unfinished, (at, at))
    prefixes.keep(unfinished, prefix)


def test_the_longest_kept_beginning_is_found_also_by_who_opens_later(tmp_path: Path) -> None:
    prefixes = Prefixes(tmp_path / "p", "owner", 10_000)
    prefixes.open()
    for length in (200, 300):
        write(prefixes, LONG[: 4 * length], 10, 1.0)
        prefixes.make_safe(LONG[: 4 * length])
    for each in (prefixes, Prefixes(tmp_path / "p", "owner", 10_000)):
        each.open()
        assert each.longest(LONG)[0] == 300
        assert each.longest(LONG[: 4 * 299])[0] == 200
        assert each.longest(packed([9]) + LONG) == (0, None)
    stranger = Prefixes(tmp_path / "p", "stranger", 10_000)
    stranger.open()
    assert stranger.longest(LONG) == (0, None)


def test_a_beginning_that_may_not_be_on_the_disk_is_nobodys_who_starts(tmp_path: Path) -> None:
    prefixes = Prefixes(tmp_path, "owner", 10_000)
    write(prefixes, LONG[:800], 10, 1.0)
    assert prefixes.longest(LONG)[0] == 200
    later = Prefixes(tmp_path, "owner", 10_000)
    later.open()
    assert later.longest(LONG) == (0, None)
    write(later, LONG[:800], 10, 1.0)
    later.make_safe(LONG[:800])
    later.make_safe(LONG[:1200])  # another process has made room
    prefixes.open()
    assert prefixes.longest(LONG)[0] == 200


def test_the_least_recently_used_of_all_models_make_room(tmp_path: Path) -> None:
    one, other = (Prefixes(tmp_path, owner, 100) for owner in ("one", "other"))
    write(one, LONG[:800], 40, 1.0)
    write(other, LONG[:800], 40, 2.0)
    one.use(one.name(LONG[:800]))
    write(one, LONG[:1200], 40, 3.0)
    assert one.longest(LONG)[0] == 300
    assert {path.name for path in tmp_path.iterdir()} == {one.name(LONG[:800]), one.name(LONG[:1200])}
    with pytest.raises(OSError):
        other.use(other.name(LONG[:800]))


def test_files_that_another_process_removes_meanwhile_are_no_reason_to_rest(tmp_path: Path) -> None:
    for name in ("other-1-gone.bin", "gone.part"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")  # listed, and not there when it is looked at
    prefixes = Prefixes(tmp_path, "owner", 1000)
    prefixes.open()
    write(prefixes, packed([1, 2]), 900, 1)
    write(prefixes, packed([1, 3]), 900, 2)
    assert prefixes.is_usable
    assert prefixes.longest(packed([1, 2]))[1] is None  # it made room
    assert prefixes.longest(packed([1, 3]))[1] is not None


def test_one_that_could_never_fit_is_not_written(tmp_path: Path) -> None:
    prefixes = Prefixes(tmp_path, "owner", 1000)
    assert prefixes.has_room(LONG)  # nothing is known yet
    write(prefixes, LONG[:400], 500, 1.0)
    assert prefixes.has_room(LONG[:800])
    assert not prefixes.has_room(LONG)


def test_a_model_in_several_files_is_all_of_them(tmp_path: Path) -> None:
    first, second, other = (tmp_path / f"model-0000{each}-of-00003.gguf" for each in (1, 2, 3))
    for path in (first, second, other, tmp_path / "model-00004-of-00004.gguf"):
        path.write_bytes(b"a" * 100)
    assert parts(first) == [first, second, other]
    assert parts(second) == [second]
    before = fingerprint(first, "shape")
    second.write_bytes(b"b" * 100)
    os.utime(second, (1, 1))
    assert fingerprint(first, "shape") != before
    other.unlink()
    assert parts(first) == [first, second]


def test_weights_that_changed_are_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 100)
    before = fingerprint(path, "shape")
    assert fingerprint(path, "shape") == before
    assert fingerprint(path, "another shape") != before
    path.write_bytes(b"b" * 100)
    assert fingerprint(path, "shape") != before
