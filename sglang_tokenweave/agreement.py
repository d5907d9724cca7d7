"""Steps that all ranks take together: what fails on one fails on all, at the same step."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class DisagreementError(RuntimeError):
    """A step failed on some rank, or the ranks differ; the text names what, the ranks, and how."""


class LostRankError(RuntimeError):
    """Some rank did not take part in an exchange before its deadline, or is gone."""


@contextmanager
def naming_lost_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Say which rank waited in vain, where torch.distributed names an address.

    Raises:
        LostRankError: a collective in the body failed.
    """
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"rank {rank} of {world_size} does not reach all other ranks: did one "
            f"end or stop (see their logs)? {error}"
        ) from error


class Group(Protocol):
    """Ranks that exchange small values."""

    @property
    def rank(self) -> int:
        """Return which one this is."""

    @property
    def world_size(self) -> int:
        """Return how many there are."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks in rank order; raises LostRankError."""


class TorchGroup:
    """A group of torch.distributed, on the CPU."""

    def __init__(self, group: dist.ProcessGroup, deadline_s: float | None = None) -> None:
        """Wrap `group`.

        Args:
            deadline_s: how late another rank may come to a gather. By default only the group's own
                timeout bounds that, and it is long: ranks that load a model are minutes apart.
        """
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        self._deadline_s = deadline_s

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        with naming_lost_ranks(self.rank, self.world_size):
            self._meet()
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _meet(self) -> None:
        # all_gather_object takes no timeout, but gloo has a barrier that does. It bounds the wait
        # for a rank that does not come. One that ends after it closes its connection, which fails
        # the gather at once; one that is stopped in between is left to the group's timeout, as is
        # everything in a group that is not gloo's.
        if self._deadline_s is not None and dist.get_backend(self._group) == dist.Backend.GLOO:
            deadline = timedelta(seconds=self._deadline_s)
            dist.monitored_barrier(self._group, timeout=deadline, wait_all_ranks=True)


def as_group(group: dist.ProcessGroup | Group, deadline_s: float | None = None) -> Group:
    """Return `group` itself, or a group of torch.distributed with this deadline."""
    return TorchGroup(group, deadline_s) if isinstance(group, dist.ProcessGroup) else group


def gather(value: T, group: dist.ProcessGroup | Group) -> list[T]:
    """Return the values of all ranks in rank order; a collective call.

    Raises:
        LostRankError: some rank did not take part.
    """
    return as_group(group).gather(value)


def compare(what: str, value: str, group: Group) -> None:
    """Stop where ranks that must say the same do not; a collective call.

    Raises:
        DisagreementError: on all ranks, with what each of them says.
        LostRankError: some rank did not take part.
    """
    values = group.gather(value)
    if len(set(values)) > 1:
        said = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(values))
        raise DisagreementError(f"{what} differs between ranks: {said}")


def step(
    name: str,
    group: dist.ProcessGroup | Group,
    action: Callable[[], T],
    *,
    is_transient: Callable[[Exception], bool] = lambda _: False,
    pauses_s: Sequence[float] = (),
) -> T:
    """Run `action` on every rank and go on only if it succeeded on all of them.

    While all failures are transient, the ranks where it failed try again, after a pause that all
    ranks make together; the others keep their result.

    Args:
        is_transient: whether another try may help after this error.
        pauses_s: how long to wait before each further try; none by default.

    Raises:
        DisagreementError: on all ranks, if `action` raised RuntimeError or OSError on any.
        LostRankError: some rank did not take part.
    """
    done: Any = None
    problem: tuple[str, bool] | None = ("", True)
    for pause_s in (*pauses_s, None):
        if problem is not None:
            problem = None
            try:
                done = action()
            except (RuntimeError, OSError) as error:
                problem = (str(error), is_transient(error))
        found = {r: it for r, it in enumerate(gather(problem, group)) if it is not None}
        if not found:
            result: T = done
            return result
        if pause_s is None or not all(transient for _, transient in found.values()):
            failed = "; ".join(f"rank {rank}: {text}" for rank, (text, _) in found.items())
            raise DisagreementError(f"{name} failed on {failed}")
        time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")
