"""What communication a step hid behind computation, and what it left exposed."""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_tokenweave.timeline import layers
from sglang_tokenweave.timeline.intervals import Intervals
from sglang_tokenweave.timeline.layers import Place
from sglang_tokenweave.timeline.operations import (
    Labelled,
    Operation,
    computing,
    labelled,
    operations,
)
from sglang_tokenweave.timeline.steps import Step
from sglang_tokenweave.timeline.trace import TraceError


@dataclass(frozen=True)
class Timed:
    """An operation's own time: what an earlier one took up already is not counted again."""

    operation: Operation
    place: Place
    hidden: Intervals  # computation ran on another stream
    exposed: Intervals  # it did not


@dataclass(frozen=True)
class Total:
    """Lengths in nanoseconds."""

    hidden: int
    exposed: int

    @property
    def length(self) -> int:
        return self.hidden + self.exposed


@dataclass(frozen=True)
class Overlap:
    """A step, taken apart."""

    step: Step
    labelled: tuple[Labelled, ...]
    computing: Intervals
    timed: tuple[Timed, ...]
    parts: int

    @property
    def total(self) -> Total:
        return _total(self.timed)

    @property
    def idle(self) -> int:
        """Nanoseconds in which the GPU did nothing that the profile shows."""
        busy = Intervals.of((each.start, each.end) for each in self.step.activities)
        return self.step.end - self.step.start - busy.length

    @property
    def by_place(self) -> dict[Place, Total]:
        """Return the totals of all places, in the order in which they first communicate."""
        grouped: dict[Place, list[Timed]] = {}
        for each in self.timed:
            grouped.setdefault(each.place, []).append(each)
        return {place: _total(timed) for place, timed in grouped.items()}


def measure(step: Step, parts: int | None, source: str) -> Overlap:
    """Take a step apart; `parts` is what its batch was cut into, None to find out.

    Raises:
        TraceError: the step communicates nothing.
    """
    found = labelled(step.activities)
    done = operations(found)
    if not done:
        raise TraceError(
            f"{source}: no communication among {len(found)} activities of step {step.index}; "
            "profile a server with --tp 2 or more"
        )
    parts = layers.count_parts(found) if parts is None else parts
    where = layers.places(done, found, step.ranges, parts)
    busy = computing(found)
    return Overlap(step, found, busy, _timed(done, where, busy), parts)


def _timed(done: Sequence[Operation], where: Sequence[Place], busy: Intervals) -> tuple[Timed, ...]:
    timed, before = [], Intervals()
    for operation, place in zip(done, where, strict=True):
        own = operation.intervals - before
        # Later ones start later: what ended by then cannot meet them.
        running = (span for span in before.spans if span[1] > operation.start)
        before = Intervals.of(running) | operation.intervals
        timed.append(Timed(operation, place, own & busy, own - busy))
    return tuple(timed)


def _total(timed: Sequence[Timed]) -> Total:
    return Total(
        sum(each.hidden.length for each in timed), sum(each.exposed.length for each in timed)
    )
