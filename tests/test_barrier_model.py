"""The barrier of cuda/barrier.cuh between ranks, in every order of its steps.

One CTA a rank. To meet, a rank stores its epoch in the pad of every rank (its own too), each store
a step of its own, and waits until every entry of its own pad has reached that epoch, each
observation a step of its own: on a GPU, thread `peer` stores to `peer` and then waits for it, so
stores and observations of different peers come in any order. A rank that comes late is one whose
steps come last, so lateness needs no steps of its own.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Model:
    """A barrier, what it compares, and what the launches around it do."""

    num_ranks: int
    num_meets: int  # two a launch: its entry and its exit
    epoch_bits: int = 32
    first_epoch: int = 0
    reached: Callable[[int, int, int], bool] | None = None  # of seen, epoch, modulus
    resets: bool = False  # a rank clears its pad's entry as it observes it
    stores_first: bool = False  # leaves once its own stores are done: no waiting at all
    compares_at_exit: bool = False  # the digests of the arguments, which it does at the entry only

    def has_reached(self, seen: int, epoch: int) -> bool:
        """Compare as the device does: the sign of the wrapped difference."""
        modulus = 1 << self.epoch_bits
        if self.reached is not None:
            return self.reached(seen, epoch, modulus)
        return (seen - epoch) % modulus < modulus // 2


# A rank is (meet, which peers it has stored to, which peers it has observed), the latter two as
# bits; pads[rank][peer] is the last epoch, unwrapped less the first, that `peer` stored there.
Rank = tuple[int, int, int]
State = tuple[tuple[Rank, ...], tuple[tuple[int, ...], ...]]


class Broken(AssertionError):
    """A property that the model's barrier does not have."""


def start(model: Model) -> State:
    return ((0, 0, 0),) * model.num_ranks, ((0,) * model.num_ranks,) * model.num_ranks


def advance(model: Model, ranks: tuple[Rank, ...], rank: int, stored: int, seen: int) -> list[Rank]:
    """Return the ranks after a step of one, which leaves its meet when it has seen everybody."""
    everybody = (1 << model.num_ranks) - 1
    meet = ranks[rank][0]
    changed = list(ranks)
    leaves = stored == everybody and (seen == everybody or model.stores_first)
    changed[rank] = (meet + 1, 0, 0) if leaves else (meet, stored, seen)
    if leaves and any(not has_entered(other, meet) for other in ranks):
        raise Broken(f"rank {rank} left meet {meet} before all had entered it: {ranks}")
    return changed


def has_entered(rank: Rank, meet: int) -> bool:
    """Tell whether a rank has begun a meet: its first store is the first that others can see."""
    at, stored, _ = rank
    return at > meet or (at == meet and stored != 0)


def with_pad(pads: tuple[tuple[int, ...], ...], owner: int, peer: int, epoch: int):
    entries = list(pads[owner])
    entries[peer] = epoch
    return (*pads[:owner], tuple(entries), *pads[owner + 1 :])


def steps(model: Model, state: State) -> Iterator[State]:
    """Yield the states that one step of one rank leads to."""
    ranks, pads = state
    modulus = 1 << model.epoch_bits
    for rank, (meet, stored, seen) in enumerate(ranks):
        if meet == model.num_meets:
            continue
        epoch = meet + 1
        for peer in range(model.num_ranks):
            bit = 1 << peer
            if not stored & bit:
                changed = advance(model, ranks, rank, stored | bit, seen)
                yield tuple(changed), with_pad(pads, peer, rank, epoch)
            elif not seen & bit:
                entry = pads[rank][peer]
                wrapped = (model.first_epoch + entry) % modulus
                if model.has_reached(wrapped, (model.first_epoch + epoch) % modulus):
                    if meet % 2 == 0 or model.compares_at_exit:
                        check_digest(rank, meet, entry)
                    changed = advance(model, ranks, rank, stored, seen | bit)
                    yield tuple(changed), with_pad(pads, rank, peer, 0) if model.resets else pads


def check_digest(rank: int, meet: int, entry: int) -> None:
    """The digest beside an epoch is that of its launch: to be compared, it must be the same."""
    if (entry - 1) // 2 != meet // 2:
        raise Broken(f"rank {rank} in launch {meet // 2} compares digests with epoch {entry}")


def explore(model: Model) -> int:
    """Visit every state there is, those of fewest steps first, and return their number.

    Raises:
        Broken: a rank leaves early, none can go on, or a difference is too large to compare.
    """
    frontier = deque([start(model)])
    visited = set(frontier)
    while frontier:
        ranks, pads = state = frontier.popleft()
        for rank, (meet, _, _) in enumerate(ranks):
            # Unless it has left its last meet, what a rank compares with is meet + 1.
            apart = max(abs(entry - (meet + 1)) for entry in pads[rank])
            if not model.resets and apart > 1 and meet < model.num_meets:
                raise Broken(f"rank {rank} compares epochs {apart} apart: {state}")
        following = set(steps(model, state))
        if not following and any(meet < model.num_meets for meet, _, _ in ranks):
            raise Broken(f"nobody can go on: {state}")
        new = following - visited
        visited |= new
        frontier += new
    return len(visited)


@pytest.mark.parametrize(("num_ranks", "num_meets"), [(2, 2), (2, 6), (3, 2), (3, 6)])
def test_nobody_leaves_early_and_all_go_on(num_ranks, num_meets):
    explore(Model(num_ranks, num_meets))


@pytest.mark.parametrize("first_epoch", range(8))
@pytest.mark.parametrize(("num_ranks", "num_meets"), [(2, 10), (3, 2)])
def test_epochs_may_wrap(num_ranks, num_meets, first_epoch):
    explore(Model(num_ranks, num_meets, epoch_bits=3, first_epoch=first_epoch))


def test_epochs_that_meet_differ_by_one_so_two_bits_are_enough():
    explore(Model(2, 10, epoch_bits=2))
    with pytest.raises(Broken, match="nobody can go on"):
        explore(Model(2, 4, epoch_bits=1))


@pytest.mark.parametrize(
    ("bug", "broken"),
    [
        ({"reached": lambda seen, epoch, _: seen == epoch}, "nobody can go on"),
        ({"reached": lambda seen, epoch, _: seen >= epoch}, "before all had entered"),
        (
            {"reached": lambda seen, epoch, _: seen > epoch - 2},
            "before all had entered|compares digests",
        ),
        ({"resets": True}, "nobody can go on"),
        ({"stores_first": True}, "before all had entered"),
        ({"compares_at_exit": True, "num_meets": 4}, "compares digests"),
    ],
    ids=["equal", "unsigned", "off by one", "resets the pad", "does not wait", "digest at exit"],
)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_model_finds(num_ranks, bug, broken):
    with pytest.raises(Broken, match=broken):
        explore(Model(num_ranks, **{"num_meets": 2, "epoch_bits": 3, "first_epoch": 6, **bug}))
