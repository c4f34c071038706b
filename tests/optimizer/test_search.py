"""The search, over a machine that is a formula."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from octoai.optimizer.outcome import Bounds, Goal, Outcome, Trial, TrialFailed, score
from octoai.optimizer.search import MOST_ROUNDS, Search
from octoai.optimizer.space import AS_GIVEN, Candidate, engine_defaults, first_guesses, stages
from octoai.optimizer.workload import Speed

CORES = 4
RECIPES = [AS_GIVEN, "Q8_0", "Q4_0", "Q4_K"]
FORMATS = {AS_GIVEN: 1.0, "Q8_0": 1.6, "Q4_0": 2.2, "Q4_K": 0.7}
LOSSES = {"Q8_0": 0.001, "Q4_0": 0.2, "Q4_K": 0.05}
TRIAL_SECONDS = 3.0
KERNELS = Path("kernels.so")


@dataclass(frozen=True)
class Lost:
    kl_nats: float
    same_top: float = 0.9


@dataclass
class Machine:
    """Measures by a formula, on a clock of its own. `drift` is how much faster it becomes by the trial; `collapsing`
    are counts of spins that do not bear company, `failing` and `slow` the trials by their number that another program
    spoils, or slows down. With the kernels of this CPU it computes `quicker`, and loses
    `lost_by_kernels` beside what the weights do."""

    noise: float = 0.0
    drift: float = 0.0
    broken: frozenset[str] = frozenset()
    hanging: frozenset[str] = frozenset()
    collapsing: frozenset[int | None] = frozenset()
    interrupted_at: int | None = None
    quicker: float = 1.5
    lost_by_kernels: float = 0.0001
    failing: frozenset[int] = frozenset()
    slow: frozenset[int] = frozenset()
    spins: dict[int | None, float] = field(default_factory=lambda: {None: 2.0, 1000: 1.3, 0: 1.0})
    now: float = 100.0
    num_trials: int = 0
    asked: list[str] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def speed(
        self, candidate: Candidate, share: float, turn: int, max_seconds: float | None = None
    ) -> tuple[Speed, int]:
        if candidate.weights in self.hanging:
            assert max_seconds is not None
            self.now += max_seconds
            raise TrialFailed("not done")
        self.now += TRIAL_SECONDS
        self.num_trials += 1
        if self.num_trials == self.interrupted_at:
            raise KeyboardInterrupt
        if candidate.weights in self.broken:
            raise TrialFailed("could not load it")
        if self.num_trials in self.failing:
            raise TrialFailed("not done in 9 s")
        rate = self.rate(candidate) * (1 + self.drift) ** self.num_trials
        rate *= self.random.uniform(1 - self.noise, 1 + self.noise) * (0.01 if self.num_trials in self.slow else 1)
        return Speed(10 * rate, rate, rate * candidate.num_slots**0.2), candidate.num_slots * 100

    def rate(self, candidate: Candidate) -> float:
        threads = {1: 1.0, 2: 1.8, 3: 2.4, 4: 2.0}[candidate.num_threads]
        waiting = self.spins[candidate.tuning.spin_count] * (self.quicker if candidate.tuning.kernels else 1)
        return 20 * FORMATS[candidate.weights] * threads * waiting / (1 + abs(candidate.batch_tokens - 256) / 1000)

    def loss(self, candidate: Candidate, bound: float | None = None) -> Lost:
        self.now += TRIAL_SECONDS if bound is None else TRIAL_SECONDS / 3
        if bound is None:
            self.asked.append(candidate.weights)
        by_kernels = self.lost_by_kernels if candidate.tuning.kernels else 0.0
        return Lost(LOSSES.get(candidate.weights, 0.0) + by_kernels)

    def steadiness(self, candidate: Candidate, max_seconds: float | None = None) -> float:
        self.now += TRIAL_SECONDS
        return 0.1 if candidate.tuning.spin_count in self.collapsing else 0.8


def found(
    machine: Machine,
    *,
    seconds: float = 1000,
    goal: Goal = "balanced",
    kernels: Path | None = None,
    **bounds: float,
) -> Outcome:
    search = Search(
        machine,
        stages(RECIPES, CORES),
        starts=first_guesses(CORES, kernels),
        defaults=engine_defaults(CORES),
        goal=goal,
        bounds=Bounds(**bounds),  # type: ignore[arg-type]
    )
    return search.run(seconds, lambda: machine.now)


def test_it_finds_the_best_that_loses_little() -> None:
    best = found(Machine()).best
    assert (best.weights, best.num_threads, best.num_slots, best.batch_tokens) == ("Q8_0", 3, 8, 256)


def test_it_finds_about_the_best_on_a_noisy_machine_that_becomes_faster_all_the_time() -> None:
    for seed in range(10):
        machine = Machine(noise=0.03, drift=0.01, random=random.Random(seed))
        assert machine.rate(found(machine).best) > 0.85 * machine.rate(found(Machine()).best)


def test_a_format_that_loses_more_is_not_chosen_and_one_that_may_is() -> None:
    assert found(Machine(), max_loss=0.0).best.weights == AS_GIVEN
    assert found(Machine(), max_loss=0.5).best.weights == "Q4_0"


def test_what_a_format_would_have_lost_is_said_where_it_was_not_tried_for_it() -> None:
    notes = {trial.candidate.weights: trial.note for trial in found(Machine(), max_loss=0.0).trials if trial.note}
    assert notes["Q8_0"] == "loses 0.0010 nats, more than 0 (--max-loss)"
    assert not any(trial.note for trial in found(Machine(), max_loss=0.5).trials if trial.stage == "quality")


def test_kernels_for_this_cpu_are_chosen_where_they_are_faster_and_their_loss_is_measured() -> None:
    outcome = found(Machine(), kernels=KERNELS)
    assert (outcome.best.weights, outcome.best.tuning.kernels) == ("Q8_0", KERNELS)
    assert outcome.losses == {(AS_GIVEN, KERNELS): Lost(0.0001), ("Q8_0", KERNELS): Lost(0.0011)}
    assert found(Machine(quicker=0.9), kernels=KERNELS).best.tuning.kernels is None


def test_kernels_that_compute_something_else_are_not_chosen_and_spoil_nothing() -> None:
    best = found(Machine(lost_by_kernels=9.0), kernels=KERNELS).best
    assert (best.weights, best.tuning.kernels) == ("Q8_0", None)


def test_quality_is_measured_in_full_once_and_only_for_what_is_chosen() -> None:
    machine = Machine()
    outcome = found(machine, max_loss=0.5)
    assert machine.asked == ["Q4_0"]
    assert outcome.losses["Q4_0", None].kl_nats == LOSSES["Q4_0"]


def test_a_format_that_looked_better_at_a_glance_than_it_is_is_not_chosen() -> None:
    class Misleading(Machine):
        def loss(self, candidate: Candidate, bound: float | None = None) -> Lost:
            lost = Machine.loss(self, candidate, bound)
            return lost if bound is None else Lost(0.0)

    outcome = found(Misleading())
    assert outcome.best.weights == "Q8_0"
    assert outcome.losses["Q4_0", None].kl_nats == LOSSES["Q4_0"]


def test_formats_smaller_than_one_that_loses_by_far_too_much_are_not_looked_at() -> None:
    looked: list[str] = []

    class Looking(Machine):
        def loss(self, candidate: Candidate, bound: float | None = None) -> Lost:
            looked.append(candidate.weights)
            return Machine.loss(self, candidate, bound)

    found(Looking())
    assert set(looked) == {"Q8_0", "Q4_0"}


def test_a_format_that_loses_too_much_is_not_even_timed() -> None:
    timed = {trial.candidate.weights for trial in found(Machine()).trials if trial.speed}
    assert timed == {AS_GIVEN, "Q8_0"}


def test_what_collapses_in_company_is_not_chosen_though_it_is_fastest_alone() -> None:
    machine = Machine(collapsing=frozenset({1000}), spins={0: 1.0, 1000: 2.0, None: 1.5})
    assert found(machine).best.tuning.spin_count is None
    assert found(machine, min_steadiness=0.05).best.tuning.spin_count == 1000


def test_memory_is_bounded() -> None:
    outcome = found(Machine(), max_memory_bytes=700)
    assert outcome.best.num_slots == 4
    assert any(trial.note == "too much memory" for trial in outcome.trials)


@pytest.mark.parametrize("seconds", [1, 10, 30, 60, 120, 300])
def test_the_budget_is_exceeded_by_no_more_than_a_trial(seconds: float) -> None:
    machine = Machine()
    outcome = found(machine, seconds=seconds)
    assert machine.now - 100 < seconds + TRIAL_SECONDS
    assert FORMATS[outcome.best.weights] >= 1


def test_what_kernels_lose_is_not_measured_when_there_is_no_time_for_them_any_more() -> None:
    machine = Machine()
    assert not found(machine, seconds=TRIAL_SECONDS, kernels=KERNELS).is_usable
    assert machine.asked == []


def test_what_was_clearly_faster_in_a_round_is_kept_when_time_runs_out_before_the_next() -> None:
    kept = {found(Machine(), seconds=seconds).best.weights for seconds in range(1, 40)}
    assert kept == {AS_GIVEN, "Q8_0"}
    assert found(Machine(), seconds=39).best.weights == "Q8_0"


def test_candidates_that_fail_are_lines_of_the_table() -> None:
    outcome = found(Machine(broken=frozenset({"Q8_0"})))
    assert outcome.best.weights == AS_GIVEN
    assert "failed: could not load it" in [trial.note for trial in outcome.trials]


def test_a_candidate_that_hangs_costs_no_more_than_a_few_trials() -> None:
    machine = Machine(hanging=frozenset({"Q8_0"}))
    outcome = found(machine)
    assert machine.now < found_in(Machine()) + 5 * TRIAL_SECONDS
    assert outcome.best.weights == AS_GIVEN


def found_in(machine: Machine) -> float:
    found(machine)
    return machine.now


def test_a_model_that_cannot_be_run_at_all_is_said_to_be_unusable() -> None:
    outcome = found(Machine(broken=frozenset(RECIPES)))
    assert not outcome.is_usable
    assert outcome.ratios is None


def test_a_start_that_takes_too_much_memory_begins_with_less() -> None:
    outcome = found(Machine(), max_memory_bytes=250)
    assert outcome.is_usable
    assert outcome.best.num_slots == 2
    assert not found(Machine(), max_memory_bytes=50).is_usable


def test_a_start_that_took_too_much_memory_is_not_tried_again() -> None:
    outcome = found(Machine(), max_memory_bytes=250)
    assert [trial.candidate.num_slots for trial in outcome.trials if trial.stage == "start"] == [8, 4, 2]
    assert outcome.start == outcome.trials[3].candidate


@pytest.mark.parametrize("spoilt", [{"slow": frozenset({1, 2})}, {"failing": frozenset({2})}])
def test_a_start_that_another_program_slowed_down_is_tried_again(spoilt: dict[str, frozenset[int]]) -> None:
    outcome = found(Machine(**spoilt), seconds=20)  # type: ignore[arg-type]
    usual = first_guesses(CORES)[0]
    assert [trial.candidate for trial in outcome.trials if trial.stage == "start"] == [usual, usual]
    assert outcome.start == usual


@pytest.mark.parametrize("failing", [{1}, {1, 2}])
def test_a_baseline_that_cannot_be_measured_does_not_end_the_search(failing: set[int]) -> None:
    outcome = found(Machine(failing=frozenset(failing)))
    assert [trial.stage for trial in outcome.trials][:3] == ["defaults", "defaults", "start"]
    assert outcome.best == found(Machine()).best
    assert len(outcome.pairs) == MOST_ROUNDS


def test_a_baseline_that_takes_half_of_the_time_in_vain_is_not_tried_again() -> None:
    class Hanging(Machine):
        def rate(self, candidate: Candidate) -> float:
            if candidate == engine_defaults(CORES):
                self.now += 60
                raise TrialFailed("not done in 60 s")
            return Machine.rate(self, candidate)

    outcome = found(Hanging(), seconds=120)
    assert [trial.stage for trial in outcome.trials][:2] == ["defaults", "start"]
    assert outcome.is_usable


def test_a_search_goes_on_without_a_baseline_that_never_runs() -> None:
    class Without(Machine):
        def rate(self, candidate: Candidate) -> float:
            if candidate == engine_defaults(CORES):
                raise TrialFailed("no memory for it")
            return Machine.rate(self, candidate)

    outcome = found(Without())
    assert outcome.is_usable
    assert outcome.best == found(Machine()).best
    assert outcome.ratios is None


def test_the_best_so_far_stays_within_its_bounds_when_the_machine_becomes_slower() -> None:
    machine = Machine(drift=-0.05)
    outcome = found(machine, max_step_seconds=0.3)
    assert outcome.best.weights == "Q8_0"
    assert outcome.ratios is not None


def test_batches_that_take_long_are_not_chosen() -> None:
    assert found(Machine(), max_step_seconds=0.12).best.batch_tokens == 128


def test_what_was_found_until_an_interruption_is_kept() -> None:
    outcome = found(Machine(interrupted_at=20))
    assert outcome.is_interrupted
    assert outcome.best.weights == "Q8_0"
    assert found(Machine(interrupted_at=1)).best == first_guesses(CORES)[0]


def test_the_end_compares_the_best_with_the_defaults_in_turn() -> None:
    machine = Machine(drift=0.05)
    outcome = found(machine)
    ratios = outcome.ratios
    assert ratios is not None
    expected = machine.rate(outcome.best) / machine.rate(engine_defaults(CORES))
    assert ratios[1] == pytest.approx(expected * 1.05)  # measured one trial later
    last = [trial.stage for trial in outcome.trials][-4:]
    assert last == ["defaults", "chosen", "defaults", "chosen"]


def test_a_trial_spoilt_at_the_end_costs_a_round_of_the_comparison_and_no_more() -> None:
    undisturbed = Machine()
    found(undisturbed)
    for number in range(undisturbed.num_trials - 2 * MOST_ROUNDS + 1, undisturbed.num_trials + 1):
        outcome = found(Machine(failing=frozenset({number})))
        assert [trial.note for trial in outcome.trials].count("failed: not done in 9 s") == 1
        assert len(outcome.pairs) == MOST_ROUNDS - 1


def test_the_defaults_have_time_for_the_comparison_however_much_faster_the_best_is() -> None:
    class Timed(Machine):
        """A trial takes as long as it is slow."""

        def speed(
            self, candidate: Candidate, share: float, turn: int, max_seconds: float | None = None
        ) -> tuple[Speed, int]:
            seconds = 4000 * share / self.rate(candidate)
            if max_seconds is not None and seconds > max_seconds:
                self.now += max_seconds
                raise TrialFailed("not done")
            self.now += seconds
            return Machine.speed(self, candidate, share, turn, max_seconds)

    outcome = found(Timed(quicker=20.0), kernels=KERNELS, seconds=3000)
    assert outcome.best.tuning.kernels == KERNELS
    assert len(outcome.pairs) == MOST_ROUNDS


def test_goals_weigh_what_they_are_named_for() -> None:
    quick, many = Speed(200, 20, 10), Speed(100, 10, 30)
    assert score(quick, many, "latency") > 1 > score(quick, many, "throughput")
    assert score(many, many, "balanced") == pytest.approx(1)


def test_every_trial_is_told_of() -> None:
    told: list[Trial] = []
    machine = Machine()
    search = Search(
        machine,
        stages(RECIPES, CORES),
        starts=first_guesses(CORES),
        defaults=engine_defaults(CORES),
        on_trial=told.append,
    )
    assert search.run(60, lambda: machine.now).trials == told


def test_a_stage_offers_only_what_its_machine_has() -> None:
    for cores in (1, 2, 3, 64):
        for stage in stages(RECIPES, cores):
            for candidate in stage.others(first_guesses(cores)[0]):
                assert 1 <= candidate.num_threads <= cores
                assert 0 <= candidate.tuning.num_batch_threads <= cores
                assert candidate.tuning.micro_batch_tokens <= candidate.batch_tokens
                assert candidate.can_be_chosen(cores)


def test_one_cache_for_all_slots_is_tried_and_not_given_up() -> None:
    apart, together = first_guesses(2)[0], first_guesses(2, KERNELS, is_unified=True)[0]
    tried = [candidate for stage in stages(RECIPES, 2) for candidate in stage.others(apart)]
    assert any(candidate.tuning.is_unified for candidate in tried)
    tried = [candidate for stage in stages(RECIPES, 2) for candidate in stage.others(together)]
    assert all(candidate.tuning.is_unified for candidate in tried if candidate.tuning.kernels)


def test_a_candidate_says_what_it_is() -> None:
    assert str(Candidate()) == "as given, 1 thread, 4 slots, batch 64"
    assert str(engine_defaults(2)) == "as given, 2 threads, spinning, 4 slots, batch 2048/512, unified KV"
    assert str(first_guesses(2)[0]) == "as given, 2 threads, spinning while alone, 8 slots, batch 128"
    with_kernels, without = first_guesses(2, KERNELS, is_unified=True)
    assert with_kernels.tuning.is_unified
    assert not without.tuning.is_unified  # it is slow with the wheel's attention
    other = Candidate("Q8_0", 8, 2).tuned(num_batch_threads=4, spin_count=300, flash_attention="off", is_unified=True)
    assert str(other) == "Q8_0, 2+4 threads, spinning 300, 8 slots, batch 64, flash attention off, unified KV"


def test_one_disturbed_trial_costs_no_candidate_its_place() -> None:
    class Disturbed(Machine):
        def rate(self, candidate: Candidate) -> float:
            is_first = candidate.weights == "Q8_0" and not self.asked
            self.asked += ["seen"] if is_first else []
            return Machine.rate(self, candidate) * (0.55 if is_first else 1.0)

    outcome = found(Disturbed())
    assert next(each for each in outcome.trials if each.candidate.weights == "Q8_0").score == pytest.approx(0.88)
    assert outcome.best.weights == "Q8_0"
