"""The search: successive halving within stages, from what matters most to what matters least.

In each stage the best so far and its challengers are measured one after the other, briefly; the better half of these
again and for longer. Of both rounds the better figures count, since a machine that other programs share is twice as
fast in one minute as in the next, and nothing makes a candidate faster than it is. What is measured, and how, is an
argument: nothing here starts a process or looks at a clock of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path

from octoai.optimizer.outcome import Bounds, Goal, Loss, Measuring, Outcome, Trial, TrialFailed, fastest, score
from octoai.optimizer.space import ALL_RATES, SMALLEST_BATCH, Candidate, Rate, Stage
from octoai.optimizer.workload import Speed, Workload

FIRST_SHARE = 1 / 8
LARGEST_FIRST_SHARE = 1 / 4
MOST_ROUNDS = 5  # of the comparison at the end
CLEARLY_FASTER = 1.3  # in a first round alone, or a part of it
_FOR_THE_END = 0.2  # of the budget
_HOPEFUL = 0.75  # in a first round: a neighbour may have slowed it down, or the best so far not
_DEFAULT_BOUNDS = Bounds()
_PATIENCE = 3.0  # with a challenger, as a multiple of what the best so far took in the same round
_START_SECONDS = 3.0
_TRIAL = 0.01  # of the budget: what a first round may take for each, where the model is fast
_QUICK = 1 / 4  # of the budget: what took longer is not tried again
_HOPELESS = 10
_FASTER = 1.04  # less is noise


class _OutOfTime(Exception):
    pass


def _waiting(candidate: Candidate) -> object:
    """What decides how a candidate bears company."""
    tuning = candidate.tuning
    return candidate.num_threads, tuning.num_batch_threads, tuning.spin_count, tuning.gives_way


def _ever_smaller(start: Candidate) -> Iterator[Candidate]:
    yield start
    for num_slots in takewhile(bool, (start.num_slots >> halvings for halvings in count(1))):
        yield replace(start, num_slots=num_slots, batch_tokens=SMALLEST_BATCH)


class Search:
    """`defaults` are what the result is compared with, in speed and in what it says; `starts` is where the search
    begins, the first of these that runs within the bounds."""

    def __init__(
        self,
        measuring: Measuring,
        stages: Sequence[Stage],
        *,
        starts: Sequence[Candidate],
        defaults: Candidate,
        goal: Goal = "balanced",
        bounds: Bounds = _DEFAULT_BOUNDS,
        on_trial: Callable[[Trial], None] = lambda _trial: None,
    ) -> None:
        self._measuring = measuring
        self._stages = stages
        self._goal = goal
        self._bounds = bounds
        self._on_trial = on_trial
        self._defaults = defaults
        self._outcome = Outcome(best=starts[0])
        self._starts = starts
        self._rates: Sequence[Rate] = ALL_RATES
        self._glances: dict[tuple[str, Path | None], Loss | None] = {}
        self._steadiness: dict[object, float] = {}
        self._turn = 0
        self._patience: float | None = None
        self._until = 0.0
        self._share = FIRST_SHARE
        self._seconds = 0.0
        self._clock: Callable[[], float] = lambda: 0.0

    def run(self, seconds: float, clock: Callable[[], float]) -> Outcome:
        """No trial begins after `seconds`. Interrupted by the keyboard it returns what was found by then."""
        self._clock = clock
        self._seconds = seconds
        began = clock()
        try:
            self._until = began + seconds * (1 - _FOR_THE_END)
            self._within_time(self._all_stages)
            self._until = began + seconds
            self._within_time(self._compare)
        except KeyboardInterrupt:
            self._outcome.is_interrupted = True
        return self._outcome

    def _within_time(self, step: Callable[[], None]) -> None:
        try:
            step()
        except _OutOfTime:
            return

    def _all_stages(self) -> None:
        self._turn += 1
        if (speed := self._tried_twice("defaults", self._defaults, FIRST_SHARE)) is not None:
            share = _TRIAL * self._seconds / Workload().seconds(speed)
            self._share = min(LARGEST_FIRST_SHARE, max(FIRST_SHARE, share))
        self._begin(speed)
        if not self._outcome.is_usable:
            return
        for stage in self._stages:
            best, self._rates = self._outcome.best, stage.rates
            self._best_of(stage.title, best, stage.others(best))

    def _begin(self, beside: Speed | None) -> None:
        """Where the search starts, with fewer slots and smaller batches where that is too much here."""
        self._check_time()  # to see what kernels lose takes long
        usual = (start for start in self._starts if self._loses_little(start))
        for start in (each for first in usual for each in _ever_smaller(first)):
            self._outcome.best = start
            tried = self._tried_twice if start in self._starts else self._tried
            if tried("start", start, FIRST_SHARE, beside) is not None:
                self._outcome.is_usable, self._outcome.start = True, start
                return

    def _tried_twice(self, title: str, candidate: Candidate, share: float, beside: Speed | None = None) -> Speed | None:
        """For what much hangs on: another program may have spoilt its trial. Too much memory it would take again, and
        what took long leaves no time for others."""
        began = self._clock()
        speed = self._tried(title, candidate, share, beside)
        is_quick = self._clock() - began <= _QUICK * self._seconds
        if speed is None and is_quick and self._bounds.allow(self._outcome.trials[-1].memory_bytes):
            speed = self._tried(title, candidate, share, beside)
        return speed

    def _best_of(self, title: str, best: Candidate, others: Sequence[Candidate]) -> None:
        """The best so far, or the challenger that was faster in both rounds together, becomes the best."""
        challengers = [other for other in dict.fromkeys(others) if other != best and self._may_lose(other)]
        first: dict[Candidate, Speed] = {}
        second: dict[Candidate, Speed] = {}
        try:
            self._round(first, title, best, challengers, self._share)
            scores = self._scores(best, first)
            ranked = sorted((each for each in scores if scores[each] > _HOPEFUL), key=lambda each: -scores[each])
            self._round(second, title, best, ranked[: (len(scores) + 1) // 2], 2 * self._share)
        except _OutOfTime:
            self._accept(self._scores(best, first), CLEARLY_FASTER)
            raise
        both = {each: fastest(first[each], speed) for each, speed in second.items()}
        self._accept(self._scores(best, both), _FASTER)

    def _scores(self, best: Candidate, speeds: Mapping[Candidate, Speed]) -> dict[Candidate, float]:
        """Of the challengers, beside the best so far; of none where that was not measured."""
        beside = speeds.get(best)
        if beside is None:
            return {}
        return {each: score(speed, beside, self._goal, self._rates) for each, speed in speeds.items() if each != best}

    def _accept(self, scores: dict[Candidate, float], margin: float) -> None:
        """How a candidate bears company, and what it loses, take long to see: they are asked of the winner only."""
        for candidate in sorted(scores, key=lambda each: -scores[each]):
            if scores[candidate] < margin:
                return
            if self._is_steady(candidate) and self._loses_little(candidate):
                self._outcome.best = candidate
                return

    def _round(
        self, found: dict[Candidate, Speed], title: str, best: Candidate, challengers: Sequence[Candidate], share: float
    ) -> None:
        """Add speeds of those that could be measured, with the best so far; of none where that could not be."""
        self._turn += 1
        beside = self._tried(title, best, share) if challengers else None
        if beside is None:
            return
        found[best] = beside
        for candidate in challengers:
            speed = self._tried(title, candidate, share, beside)
            if speed is not None:
                found[candidate] = speed

    def _tried(self, title: str, candidate: Candidate, share: float, beside: Speed | None = None) -> Speed | None:
        """None for a candidate that failed, or takes more memory than allowed."""
        self._check_time()
        try:
            began = self._clock()
            speed, memory_bytes = self._measuring.speed(candidate, share, self._turn, self._limit(beside))
        except TrialFailed as failure:
            self._note(Trial(title, candidate, share, note=f"failed: {failure}"))
            return None
        if beside is None:
            self._patience = _PATIENCE * (self._clock() - began) + _START_SECONDS
        relative = score(speed, beside, self._goal, self._rates) if beside else 1.0
        # What was found to be within the bounds stays so when a neighbour slows a later trial down.
        is_known = candidate == self._defaults or (self._outcome.is_usable and candidate == self._outcome.best)
        note = "" if is_known else self._excess(candidate, speed, memory_bytes)
        self._note(Trial(title, candidate, share, speed, memory_bytes, relative, note))
        return None if note else speed

    def _limit(self, beside: Speed | None) -> float | None:
        """Seconds that a trial may take; the best so far has twice as long, since its round may be a longer one."""
        return self._patience if beside or self._patience is None else 2 * self._patience

    def _excess(self, candidate: Candidate, speed: Speed, memory_bytes: int) -> str:
        """What it has more of than it may; "" of nothing."""
        if not self._bounds.allow(memory_bytes):
            return "too much memory"
        seconds = candidate.batch_tokens / speed.prompt_rate
        if candidate.batch_tokens > SMALLEST_BATCH and seconds > self._bounds.max_step_seconds:
            return f"a batch takes {seconds:.1f} s"
        return ""

    def _may_lose(self, candidate: Candidate) -> bool:
        """Whether a look at its weights says that they may be good enough: cheaper than to measure in vain. They come
        from the largest to the smallest: where some lose by far too much, those after them do too."""
        arithmetic = candidate.arithmetic
        if arithmetic == self._defaults.arithmetic:
            return True
        if arithmetic not in self._glances:
            far_too_much = _HOPELESS * self._bounds.max_loss
            like_it = (glance for (_, kernels), glance in self._glances.items() if kernels == arithmetic[1])
            if any(glance and glance.kl_nats > far_too_much for glance in like_it):
                return False
            self._check_time()
            self._glances[arithmetic] = self._glance(candidate)
        glance = self._glances[arithmetic]
        return glance is not None and glance.kl_nats <= self._bounds.max_loss

    def _glance(self, candidate: Candidate) -> Loss | None:
        """As little of what it loses as tells on which side of the bound it is; None where that cannot be measured."""
        try:
            glance = self._measuring.loss(candidate, self._bounds.max_loss)
        except TrialFailed as failure:
            self._note(Trial("quality", candidate, 0.0, note=f"failed: {failure}"))
            return None
        if glance.kl_nats > self._bounds.max_loss:
            lost = f"loses {glance.kl_nats:.4f} nats, more than {self._bounds.max_loss:g} (--max-loss)"
            self._note(Trial("quality", candidate, 0.0, note=lost))
        return glance

    def _loses_little(self, candidate: Candidate) -> bool:
        """Measured in full, once for the arithmetic of each that is about to become the best."""
        arithmetic, losses = candidate.arithmetic, self._outcome.losses
        if arithmetic == self._defaults.arithmetic:
            return True
        glance = self._glances.get(arithmetic)
        if arithmetic not in losses and glance and self._clock() >= self._until:
            losses[arithmetic] = glance  # it says on which side of the bound, if not exactly how far
        if arithmetic not in losses:
            try:
                losses[arithmetic] = self._measuring.loss(candidate)
            except TrialFailed as failure:
                self._note(Trial("quality", candidate, 0.0, note=f"failed: {failure}"))
                return False
        return losses[arithmetic].kl_nats <= self._bounds.max_loss

    def _is_steady(self, candidate: Candidate) -> bool:
        waiting = _waiting(candidate)
        if waiting == _waiting(self._starts[0]):
            return True
        if waiting not in self._steadiness:
            self._check_time()
            try:
                share = self._measuring.steadiness(candidate, self._limit(None))
                self._note(Trial("company", candidate, 0.0, note=f"{share:.0%} of it while a core is taken"))
            except TrialFailed as failure:
                share = 0.0
                self._note(Trial("company", candidate, 0.0, note=f"failed: {failure}"))
            self._steadiness[waiting] = share
        return self._steadiness[waiting] >= self._bounds.min_steadiness

    def _check_time(self) -> None:
        if self._clock() >= self._until:
            raise _OutOfTime

    def _compare(self) -> None:
        """The defaults and the best in turn, until time is up: what is told to the user. One trial that another program
        spoilt is no reason to stop."""
        if not self._outcome.is_usable:
            return
        self._rates = ALL_RATES
        for _ in range(MOST_ROUNDS):
            self._turn += 1
            self._patience = None  # that of the best: the more was found, the sooner the defaults would be given up
            defaults = self._tried("defaults", self._defaults, 2 * self._share)
            if defaults is None:
                continue
            best = self._tried("chosen", self._outcome.best, 2 * self._share, defaults)
            if best is not None:
                self._outcome.pairs.append((defaults, best))

    def _note(self, trial: Trial) -> None:
        self._outcome.trials.append(trial)
        self._on_trial(trial)
