"""Measure the candidates of one batch size by successive halving, and know what that takes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sglang_tokenweave.plan import Mode
from sglang_tokenweave.tuning.table import (
    LEAST_ROUNDS,
    NOISE,
    OFF,
    Bucket,
    Candidate,
    Measurement,
    choose,
)

# `measure(candidates, mode, tokens, rounds)` returns the times of each candidate, in us, one a
# round. It runs all of them once in every round: a machine that slows down slows all of them. A
# candidate that is new since another size was measured is prepared first, its graph captured for
# one; 0 rounds do only that.
Measure = Callable[[Sequence[Candidate], Mode, int, int], Sequence[Sequence[float]]]

FIRST_ROUNDS = 3
FINAL_ROUNDS = 15  # of the finalists, OFF among them, in all
RUN_OFF_ROUNDS = 30  # of the choice and of what may beat it, where that is open
_MOST_OPEN = 2  # candidates that may beat it
_FIXED_TOKENS = 512  # a batch costs about as much as these many tokens before its first one


@dataclass(frozen=True)
class Costs:
    """What measuring takes in one mode, as last seen."""

    prepare_s: float  # a candidate, at each size
    unit_s: float  # a run, for each token

    def run_s(self, tokens: int) -> float:
        """Return what a run takes."""
        return self.unit_s * (tokens + _FIXED_TOKENS)

    def of_size(self, tokens: int, candidates: int) -> float:
        """Return what it takes to find the best of so many candidates."""
        return candidates * self.prepare_s + self.of_runs(tokens, candidates)

    def of_runs(self, tokens: int, candidates: int) -> float:
        """Return the part of it that begins when all of them are prepared."""
        return runs_of(candidates) * self.run_s(tokens)

    def least_of_size(self, tokens: int) -> float:
        """Return what it takes to compare OFF with one other in as few rounds as count."""
        return 2 * (self.prepare_s + LEAST_ROUNDS * self.run_s(tokens))

    @classmethod
    def of(cls, prepare_s: float, run_s: float, tokens: int) -> "Costs":
        """Return them from what a candidate and a run of so many tokens took."""
        return cls(prepare_s, run_s / (tokens + _FIXED_TOKENS))


def runs_of(candidates: int) -> int:
    """Return how many runs halving takes, OFF's among them."""
    done, runs = FIRST_ROUNDS, FIRST_ROUNDS * candidates
    while done < FINAL_ROUNDS:
        candidates = _next_round(candidates)
        more = FINAL_ROUNDS - done if candidates <= 3 else done
        done, runs = done + more, runs + more * candidates
    return runs


def _next_round(candidates: int) -> int:
    return min(candidates, 1 + max(2, math.ceil((candidates - 1) / 2)))


class Halving:
    """Search one size by successive halving (Jamieson and Talwalkar, AISTATS 2016).

    All candidates run a few rounds; the better half stays and runs as many again; and so on until
    two are left, which run `FINAL_ROUNDS` together with OFF. OFF always stays: it is the rival.

    Why that is enough: any candidate within 2 % of the best may win, so harm is done only where
    the best is dropped while half of the others look better, and none of those is within 2 % of it.
    The shortest of three rounds with an error of 1 % each is off by 0.75 %; so half of the others,
    each more than 2 % slower, would have to err by two standard errors of a difference at once.
    The fewer are left, the more rounds they have, so the errors shrink as the differences do. 16
    candidates take 114 runs so, and 240 if all of them ran through all rounds. Where errors are
    larger and another one than the choice has the lower median, a run-off decides.
    """

    def __init__(
        self,
        mode: Mode,
        tokens: int,
        measure: Measure,
        spent_s: Callable[[], float],
        end_s: float,
        expected: Costs,
    ) -> None:
        """Know the size; `end_s` is when all sizes have to be done, on the clock of `spent_s`."""
        self.times: dict[Candidate, list[float]] = {}
        self.costs = expected
        self._mode, self._tokens = mode, tokens
        self._measure, self._spent_s, self._end_s = measure, spent_s, end_s

    def run(self, rivals: list[Candidate], runs_s: float) -> None:
        """Run rounds of fewer and fewer rivals, OFF first, until two or the time are left.

        Args:
            rivals: all of which are prepared first.
            runs_s: for the runs alone. Rounds that make a result of what was begun run all the
                same, if there is time before the end.
        """
        before_s = self._spent_s()
        self._measure(rivals, self._mode, self._tokens, 0)
        prepared_s = self._spent_s()
        # Half of what was expected: the first of a kind load and compile what later ones find.
        prepare_s = (self.costs.prepare_s + (prepared_s - before_s) / len(rivals)) / 2
        self.costs = replace(self.costs, prepare_s=prepare_s)
        deadline_s = min(self._end_s, prepared_s + runs_s)
        rounds = 1  # tells what a run takes
        while rounds and self._run_rounds(rivals, rounds, deadline_s):
            done = len(self.times[OFF])
            if done < FIRST_ROUNDS:
                rounds = FIRST_ROUNDS - done
                continue
            if len(rivals) > 3:
                rivals = self._better_half(rivals)
            rounds = FINAL_ROUNDS - done if len(rivals) <= 3 else done
        self._run_off(deadline_s)

    def _run_off(self, deadline_s: float) -> None:
        """Measure the choice and what may be faster anew, and OFF, if there is time for it.

        Where times vary by some per cent, the best may have been dropped for its first rounds, or
        its gain not be told from noise. Older times do not count: they are why it is here.
        """
        bucket = self.bucket()
        if bucket is None or bucket.time_of(OFF).rounds < FINAL_ROUNDS:
            return
        faster = _seemingly_faster(bucket)[:_MOST_OPEN]
        rivals = list(dict.fromkeys([OFF, bucket.chosen, *faster]))
        runs_s = RUN_OFF_ROUNDS * len(rivals) * self.costs.run_s(self._tokens)
        if faster and self._spent_s() + runs_s <= deadline_s:
            for each in rivals:
                del self.times[each]
            self._run_rounds(rivals, RUN_OFF_ROUNDS, deadline_s)

    def _run_rounds(self, rivals: list[Candidate], rounds: int, deadline_s: float) -> bool:
        """Run as many of the rounds as there is time for; return whether there was for any."""
        before_s = self._spent_s()
        round_s = len(rivals) * self.costs.run_s(self._tokens)
        lacking = LEAST_ROUNDS - len(self.times.get(OFF, ()))
        in_time = int((deadline_s - before_s) / round_s)
        to_the_end = int((self._end_s - before_s) / round_s)
        rounds = min(rounds, max(in_time, min(lacking, to_the_end)))
        if rounds <= 0:
            return False
        found = self._measure(rivals, self._mode, self._tokens, rounds)
        run_s = (self._spent_s() - before_s) / (rounds * len(rivals))
        self.costs = Costs.of(self.costs.prepare_s, run_s, self._tokens)
        for rival, measured in zip(rivals, found, strict=True):
            self.times.setdefault(rival, []).extend(measured)
        return True

    def _better_half(self, rivals: list[Candidate]) -> list[Candidate]:
        others = [each for each in self.ranking() if each in rivals and each != OFF]
        return [OFF, *others[: _next_round(len(rivals)) - 1]]

    def ranking(self) -> list[Candidate]:
        """Return what ran, those first that ran longest, and of these the fastest.

        By their shortest times: whatever disturbs a run makes it longer, and of three rounds two
        may be disturbed.
        """
        return sorted(self.times, key=lambda each: (-len(self.times[each]), min(self.times[each])))

    def bucket(self) -> Bucket | None:
        """Return all that was measured, and the choice; None if it ran too rarely to count."""
        if len(self.times.get(OFF, ())) < LEAST_ROUNDS:
            return None
        measured = tuple(Measurement.of(each, found) for each, found in self.times.items())
        return Bucket(self._mode, self._tokens, choose(measured), measured)


def _seemingly_faster(bucket: Bucket) -> list[Candidate]:
    """Return what was faster than the choice by more than the least gain, the fastest first."""
    least_us = bucket.time_of(bucket.chosen).us - NOISE * bucket.time_of(OFF).us
    faster = [each for each in bucket.measured if each.us < least_us]
    return [each.candidate for each in sorted(faster, key=lambda each: each.us)]
