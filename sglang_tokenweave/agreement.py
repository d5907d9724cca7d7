"""Steps that all ranks take together: what fails on one fails on all, at the same step."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class DisagreementError(RuntimeError):
    """A step failed on at least one rank; the text names the step, the ranks and their errors."""


def gather(value: T, group: dist.ProcessGroup) -> list[T]:
    """Return the values of all ranks in rank order; a collective call on a CPU group."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def step(name: str, group: dist.ProcessGroup, action: Callable[[], T]) -> T:
    """Run `action` on every rank and go on only if it succeeded on all of them.

    Raises:
        DisagreementError: on all ranks, if `action` raised RuntimeError or OSError on any.
    """
    result: Any = None
    problem = None
    try:
        result = action()
    except (RuntimeError, OSError) as error:
        problem = str(error)
    problems = gather(problem, group)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
    if failed:
        raise DisagreementError(f"{name} failed on {'; '.join(failed)}")
    done: T = result
    return done
