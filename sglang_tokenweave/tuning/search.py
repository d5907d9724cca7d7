"""Find the best candidate of each batch size in bounded time, with few measurements."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sglang_tokenweave.plan import MOST_ONE_SHOT_TOKENS, Kind, Mode
from sglang_tokenweave.tuning.table import (
    LEAST_ROUNDS,
    LEAST_SMS,
    OFF,
    Bucket,
    Candidate,
    Measurement,
    choose,
)
from sglang_tokenweave.waves import ROW_STEP, LayerShape, cut_beside

# `measure(candidates, mode, tokens, rounds)` returns the times of each candidate, in us, one a
# round. It runs all of them once in every round: a machine that slows down slows all of them. A
# candidate that is new to a size is prepared first, its graph captured for one; 0 rounds do only
# that.
Measure = Callable[[Sequence[Candidate], Mode, int, int], Sequence[Sequence[float]]]

FIRST_ROUNDS = 3
FINAL_ROUNDS = 15  # of the finalists, OFF among them, in all
_MOVED = (-256, 256)  # tokens: the height of a tile
_FIXED_TOKENS = 512  # a batch costs about as much as these many tokens before its first one
_MEAN_ROUNDS = 7  # of a candidate, by halving


@dataclass(frozen=True)
class Space:
    """What may be tried on this server, of each kind the most promising first."""

    sms: int
    ctas: tuple[int, ...]  # beside a computation; 0: the copy engines
    fuse_ctas: tuple[int, ...]  # of the op alone
    smallest_woven_decode: int = 2  # requests
    layer: LayerShape | None = None  # of the model: tells the planner's cut from the middle
    has_one_shot: bool = False
    alike_tokens: int = 0  # ops alone of up to so many are the same, whatever their CTAs

    def candidates(self, mode: Mode, num_tokens: int) -> list[Candidate]:
        """Return all candidates for batches of `num_tokens`: OFF, then the most promising first."""
        takes_one_shot = self.has_one_shot and num_tokens <= MOST_ONE_SHOT_TOKENS
        others = self.fuse_ctas[:1] if num_tokens <= self.alike_tokens else self.fuse_ctas
        numbers = [*([0] if takes_one_shot else []), *others]
        fuses = [Candidate(Kind.FUSE, fuse_ctas=n) for n in numbers]
        smallest = self.smallest_woven_decode if mode is Mode.DECODE else 2
        if num_tokens < smallest:
            return [OFF, *fuses]
        as_planned = [
            Candidate(Kind.WEAVE, 0, ctas, max(self.fuse_ctas))
            for ctas in self.ctas
            if self.sms - ctas >= LEAST_SMS
        ]
        moved = [
            replace(each, cut_offset=offset)
            for each in as_planned
            if mode is Mode.PREFILL  # requests of one token are cut anywhere
            for offset in self._offsets(num_tokens, each.ctas)
        ]
        return [OFF, *as_planned, *fuses, *moved]

    def _offsets(self, num_tokens: int, ctas: int) -> list[int]:
        """Return how far from the planner's cut others are worth a try: the middle is one.

        The planner saves waves, of whatever GEMM; the middle hides the most communication.
        """
        offsets = list(_MOVED)
        if self.layer is not None and num_tokens >= 4 * ROW_STEP:
            planned = cut_beside((num_tokens,), self.layer, self.sms - ctas, 0, ROW_STEP)
            offsets.insert(0, num_tokens // 2 // ROW_STEP * ROW_STEP - planned)
        # A half shorter than a quarter hides nothing.
        return [each for each in dict.fromkeys(offsets) if each and num_tokens >= 4 * abs(each)]


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

    The largest prefills come first: they gain the most. Each size gets a share of what is left of
    the budget, as its work is to that still to come. Where a share is too short for all candidates,
    those run that were best at the size before. A size that has no time left is not yielded, and
    the planner leaves such batches alone.

    Args:
        sizes: modes and tokens of the batches.
        space: what may be tried.
        measure: returns the times of candidates, the same on all ranks.
        spent_s: seconds since the search began, the same on all ranks.
        budget_s: a call of `measure` that would end later, by what is known, is not made.
    """
    ordered = sorted(sizes, key=lambda size: (size[0] is Mode.DECODE, -size[1]))
    if not ordered or spent_s() >= budget_s:
        return
    smallest_first = sorted(sizes, key=lambda size: (size[0] is Mode.DECODE, size[1]))
    costs = _probe(smallest_first, space, measure, spent_s)
    ranking: list[Candidate] = []  # of the size before, the best first
    while ordered:
        without_time: list[tuple[Mode, int]] = []
        for index, (mode, tokens) in enumerate(ordered):
            still = [*without_time, *ordered[index:]]
            share_s = (budget_s - spent_s()) * costs.of_size(tokens) / costs.of_sizes(still)
            fitting = int(share_s / costs.of_size(tokens))
            rivals = _prune(space.candidates(mode, tokens), ranking, max(2, fitting))
            halving = _Halving(mode, tokens, measure, spent_s, spent_s() + share_s, costs)
            halving.run(rivals)
            if halving.times:
                costs, ranking = halving.costs, halving.ranking()
            if len(halving.times.get(OFF, ())) >= LEAST_ROUNDS:
                yield halving.bucket()
            elif not halving.times:
                without_time.append((mode, tokens))
        # The first candidates of a kind load and compile what the later ones find: what was too
        # short a time for a size may be enough, now that it is known better what it takes.
        ordered = without_time if len(without_time) < len(ordered) else []


@dataclass(frozen=True)
class _Costs:
    """What measuring takes, as last seen."""

    prepare_s: float  # a candidate, at each size
    unit_s: float  # a run, for each token

    def run_s(self, tokens: int) -> float:
        return self.unit_s * (tokens + _FIXED_TOKENS)

    def of_size(self, tokens: int) -> float:
        """Return what a candidate takes at a size."""
        return self.prepare_s + _MEAN_ROUNDS * self.run_s(tokens)

    def of_sizes(self, sizes: Sequence[tuple[Mode, int]]) -> float:
        """Return the same of all of them."""
        return sum(self.of_size(tokens) for _, tokens in sizes)

    @classmethod
    def of(cls, prepare_s: float, run_s: float, tokens: int) -> "_Costs":
        return cls(prepare_s, run_s / (tokens + _FIXED_TOKENS))


def _probe(
    sizes: Sequence[tuple[Mode, int]],
    space: Space,
    measure: Measure,
    spent_s: Callable[[], float],
) -> _Costs:
    """Measure OFF and one more once, to know what it takes: at the second size.

    What is loaded once, kernels compiled or libraries initialised, takes its time at the first.
    """
    first, again = sizes[0], sizes[min(1, len(sizes) - 1)]
    other = [each for each in space.candidates(*first) if each in space.candidates(*again)][1]
    measure([OFF, other], *first, 0)
    measure([OFF], *again, 0)
    began_s = spent_s()
    measure([other], *again, 0)
    prepared_s = spent_s()
    measure([OFF, other], *again, 1)
    return _Costs.of(prepared_s - began_s, (spent_s() - prepared_s) / 2, again[1])


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
        expected: _Costs,
    ) -> None:
        self.times: dict[Candidate, list[float]] = {}
        self.costs = expected
        self._mode, self._tokens = mode, tokens
        self._measure, self._spent_s, self._deadline_s = measure, spent_s, deadline_s

    def run(self, rivals: list[Candidate]) -> None:
        """Run rounds of fewer and fewer rivals, OFF first, until two or the time are left."""
        before_s = self._spent_s()
        if self._deadline_s - before_s <= self.costs.prepare_s * len(rivals):
            return
        self._measure(rivals, self._mode, self._tokens, 0)
        # The probe has prepared some of the first size's, and graphs of more tokens take no less.
        prepare_s = max(self.costs.prepare_s, (self._spent_s() - before_s) / len(rivals))
        self.costs = replace(self.costs, prepare_s=prepare_s)
        rounds = 1  # tells what a run takes
        while rounds and self._run_rounds(rivals, rounds):
            done = len(self.times[OFF])
            if done < FIRST_ROUNDS:
                rounds = FIRST_ROUNDS - done
                continue
            if len(rivals) > 3:
                rivals = self._better_half(rivals)
            rounds = FINAL_ROUNDS - done if len(rivals) <= 3 else done

    def _run_rounds(self, rivals: list[Candidate], rounds: int) -> bool:
        """Run as many of the rounds as there is time for; return whether there was for any."""
        before_s = self._spent_s()
        all_s = len(rivals) * self.costs.run_s(self._tokens)
        fitting = int((self._deadline_s - before_s) / all_s)
        rounds = max(0, min(rounds, fitting))
        if rounds:
            found = self._measure(rivals, self._mode, self._tokens, rounds)
            run_s = (self._spent_s() - before_s) / (rounds * len(rivals))
            self.costs = _Costs.of(self.costs.prepare_s, run_s, self._tokens)
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
