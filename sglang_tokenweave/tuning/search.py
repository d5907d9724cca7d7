"""Find the best candidate of each batch size in bounded time, with few measurements."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from sglang_tokenweave.plan import Mode
from sglang_tokenweave.tuning.halving import Costs, Halving, Measure
from sglang_tokenweave.tuning.space import Space
from sglang_tokenweave.tuning.table import OFF, Bucket, Candidate

Size = tuple[Mode, int]  # of a batch: its tokens, which of a decode are its requests


def search(
    sizes: Sequence[Size],
    space: Space,
    measure: Measure,
    spent_s: Callable[[], float],
    budget_s: float,
) -> Iterator[Bucket]:
    """Yield a bucket for each size, as it is done, within `budget_s` seconds for all of them.

    The largest prefills come first: they gain the most. Where the time is too short for all
    candidates, no size has more than the others can have, too; those run that were best at the size
    before. A size that has no time left is not yielded, and the planner leaves such batches alone.

    Args:
        sizes: modes and tokens of the batches.
        space: what may be tried.
        measure: returns the times of candidates, the same on all ranks.
        spent_s: seconds since the search began, the same on all ranks.
        budget_s: a call of `measure` that would end later, by what is known, is not made.
    """
    costs: dict[Mode, Costs] = {}
    for mode in Mode:
        smallest_first = sorted(tokens for each, tokens in sizes if each is mode)
        if smallest_first and spent_s() < budget_s:
            costs[mode] = _probe(mode, smallest_first, space, measure, spent_s)
    ordered = sorted(sizes, key=lambda size: (size[0] is Mode.DECODE, -size[1]))
    to_come = {size: space.candidates(*size) for size in ordered if size[0] in costs}
    rankings: dict[Mode, list[Candidate]] = {mode: [] for mode in Mode}  # of the size before
    while to_come:
        mode, tokens = size = next(iter(to_come))
        left_s = budget_s - spent_s()
        if costs[mode].least_of_size(tokens) <= left_s:
            most, share = _most_candidates(to_come, costs, left_s)
            rivals = _prune(to_come[size], rankings[mode], most)
            halving = Halving(mode, tokens, measure, spent_s, budget_s, costs[mode])
            halving.run(rivals, share * costs[mode].of_runs(tokens, len(rivals)))
            costs[mode], rankings[mode] = halving.costs, halving.ranking()
            if bucket := halving.bucket():
                yield bucket
        del to_come[size]


def _probe(
    mode: Mode, sizes: Sequence[int], space: Space, measure: Measure, spent_s: Callable[[], float]
) -> Costs:
    """Measure OFF and one more once, to know what it takes: at the second smallest size.

    What is loaded once, kernels compiled or libraries initialised, takes its time at the smallest.
    """
    first, again = sizes[0], sizes[min(1, len(sizes) - 1)]
    tried = space.candidates(mode, again)
    other = [each for each in space.candidates(mode, first) if each in tried][1]
    measure([OFF, other], mode, first, 0)
    measure([OFF], mode, again, 0)
    began_s = spent_s()
    measure([other], mode, again, 0)
    prepared_s = spent_s()
    measure([OFF, other], mode, again, 1)
    return Costs.of(prepared_s - began_s, (spent_s() - prepared_s) / 2, again)


def _most_candidates(
    to_come: Mapping[Size, Sequence[Candidate]], costs: Mapping[Mode, Costs], left_s: float
) -> tuple[int, float]:
    """Return how many candidates each size can have, two at least, and its runs' share.

    The share is the time that is left over what is expected to be taken, less than 1 where it is
    too short.
    """

    def all_s(most: int) -> float:
        return sum(
            costs[mode].of_size(tokens, min(most, len(candidates)))
            for (mode, tokens), candidates in to_come.items()
        )

    most = max(map(len, to_come.values()))
    while most > 2 and all_s(most) > left_s:
        most -= 1
    return most, left_s / all_s(most)


def _prune(rivals: list[Candidate], ranking: list[Candidate], most: int) -> list[Candidate]:
    if len(rivals) <= most:
        return rivals
    known = [each for each in ranking if each in rivals and each != OFF]
    return [OFF, *known, *(each for each in rivals[1:] if each not in known)][:most]
