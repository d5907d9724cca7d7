"""Find the best candidate of each batch size in bounded time, with few measurements."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sglang_tokenweave.plan import Kind, Mode
from sglang_tokenweave.tuning.table import (
    LEAST_ROUNDS,
    LEAST_SMS,
    OFF,
    Bucket,
    Candidate,
    Measurement,
    choose,
)

# `measure(candidates, mode, tokens, rounds)` returns the times of each candidate, in us, one a
# round. It runs all of them once in every round: a machine that slows down slows all of them.
Measure = Callable[[Sequence[Candidate], Mode, int, int], Sequence[Sequence[float]]]

FIRST_ROUNDS = 3
FINAL_ROUNDS = 15  # of the finalists, OFF among them, in all
CUT_OFFSETS = (0, -256, 256)  # tokens: the height of a tile
_FIXED_TOKENS = 512  # a batch costs about as much as these many tokens before its first one


@dataclass(frozen=True)
class Space:
    """What may be tried on this server."""

    sms: int
    ctas: tuple[int, ...]  # beside a computation; 0: the copy engines
    fuse_ctas: tuple[int, ...]  # of the op alone

    def candidates(self, mode: Mode, num_tokens: int) -> list[Candidate]:
        """Return all candidates for batches of `num_tokens`, OFF first."""
        fuses = [Candidate(Kind.FUSE, fuse_ctas=n) for n in self.fuse_ctas]
        weaves = [
            Candidate(Kind.WEAVE, offset, ctas, self.fuse_ctas[-1])
            for ctas in self.ctas
            if self.sms - ctas >= LEAST_SMS
            for offset in CUT_OFFSETS
            # A half shorter than a quarter hides nothing; requests of one token are cut anywhere.
            if offset == 0 or (mode is Mode.PREFILL and num_tokens >= 4 * abs(offset))
        ]
        return [OFF, *fuses, *(weaves if num_tokens > 1 else [])]


def bucket_sizes(largest: int, smallest: int) -> list[int]:
    """Return the powers of two from `smallest` on below `largest`, and `largest`."""
    sizes = [smallest << step for step in range(64) if smallest << step < largest]
    return [*sizes, largest] if largest >= smallest else []


def search(
    sizes: Sequence[tuple[Mode, int]],
    space: Space,
    measure: Measure,
    spent_s: Callable[[], float],
    budget_s: float,
) -> Iterator[Bucket]:
    """Yield a bucket for each size, as it is done, within `budget_s` seconds for all of them.

    Each size gets a share of what is left of the budget, as its tokens are to those still to come.
    Where a share is too short for all candidates, those run that were best at the size before. A
    size that has no time left is not yielded, and the planner leaves such batches alone.

    Args:
        sizes: modes and tokens of the batches.
        space: what may be tried.
        measure: returns the times of candidates, the same on all ranks.
        spent_s: seconds since the search began, the same on all ranks.
        budget_s: a call of `measure` that would end later, by what is known, is not made.
    """
    ordered = sorted(sizes, key=lambda size: (size[0] is Mode.DECODE, size[1]))
    weights = [tokens + _FIXED_TOKENS for _, tokens in ordered]
    cost_s: float = 0  # of a run, per unit of weight
    ranking: list[Candidate] = []  # of the size before, the best first
    for index, (mode, tokens) in enumerate(ordered):
        share_s = (budget_s - spent_s()) * weights[index] / sum(weights[index:])
        rivals = space.candidates(mode, tokens)
        if cost_s:
            fitting = int(share_s / (cost_s * weights[index] * LEAST_ROUNDS))
            rivals = _prune(rivals, ranking, max(2, fitting))
        halving = _Halving(mode, tokens, measure, spent_s, spent_s() + share_s)
        halving.run(rivals, cost_s * weights[index])
        if halving.times:
            cost_s, ranking = halving.cost_s / weights[index], halving.ranking()
        if len(halving.times.get(OFF, ())) >= LEAST_ROUNDS:
            yield halving.bucket()


def _prune(rivals: list[Candidate], ranking: list[Candidate], most: int) -> list[Candidate]:
    if len(rivals) <= most:
        return rivals
    known = [each for each in ranking if each in rivals and each != OFF]
    return [OFF, *known, *(each for each in rivals[1:] if each not in known)][:most]


class _Halving:
    """Search one size by successive halving (Jamieson and Talwalkar, AISTATS 2016).

    All candidates run a few rounds; the better half stays and runs as many again; and so on until
    two are left, which run `FINAL_ROUNDS` together with OFF. OFF always stays: it is the rival.

    Why that is enough: any candidate within 2 % of the best may win, so harm is done only where
    the best is dropped while half of the others look better, and none of those is within 2 % of it.
    The shortest of three rounds with an error of 1 % each is off by 0.75 %; so half of the others,
    each more than 2 % slower, would have to err by two standard errors of a difference at once.
    The fewer are left, the more rounds they have, so the errors shrink as the differences do. 16
    candidates take 114 runs so, and 240 if all of them ran through all rounds.
    """

    def __init__(
        self,
        mode: Mode,
        tokens: int,
        measure: Measure,
        spent_s: Callable[[], float],
        deadline_s: float,
    ) -> None:
        self.times: dict[Candidate, list[float]] = {}
        self.cost_s = 0.0  # of one run, as last seen
        self._mode, self._tokens = mode, tokens
        self._measure, self._spent_s, self._deadline_s = measure, spent_s, deadline_s

    def run(self, rivals: list[Candidate], cost_s: float) -> None:
        """Run rounds of fewer and fewer rivals until the last ones or the time are done.

        Args:
            rivals: OFF first.
            cost_s: what one run will take, 0 if nothing is known.
        """
        rounds = 1  # tells what a run takes
        while rounds and self._run_rounds(rivals, rounds, cost_s):
            cost_s, done = self.cost_s, len(self.times[OFF])
            if done < FIRST_ROUNDS:
                rounds = FIRST_ROUNDS - done
                continue
            if len(rivals) > 3:
                rivals = self._better_half(rivals)
            rounds = FINAL_ROUNDS - done if len(rivals) <= 3 else done

    def _run_rounds(self, rivals: list[Candidate], rounds: int, cost_s: float) -> bool:
        """Run as many of the rounds as there is time for; return whether there was for any."""
        before_s = self._spent_s()
        left_s = self._deadline_s - before_s
        fitting = int(left_s / (len(rivals) * cost_s)) if cost_s else int(left_s > 0)
        rounds = max(0, min(rounds, fitting))
        if rounds:
            found = self._measure(rivals, self._mode, self._tokens, rounds)
            self.cost_s = (self._spent_s() - before_s) / (rounds * len(rivals))
            for rival, measured in zip(rivals, found, strict=True):
                self.times.setdefault(rival, []).extend(measured)
        return rounds > 0

    def _better_half(self, rivals: list[Candidate]) -> list[Candidate]:
        others = [each for each in self.ranking() if each in rivals and each != OFF]
        return [OFF, *others[: max(2, math.ceil(len(others) / 2))]]

    def ranking(self) -> list[Candidate]:
        """Return what ran, those first that ran longest, and of these the fastest.

        By their shortest times: whatever disturbs a run makes it longer, and of three rounds two
        may be disturbed.
        """
        return sorted(self.times, key=lambda each: (-len(self.times[each]), min(self.times[each])))

    def bucket(self) -> Bucket:
        """Return all that was measured, and the choice."""
        measured = tuple(Measurement.of(each, found) for each, found in self.times.items())
        return Bucket(self._mode, self._tokens, choose(measured), measured)
