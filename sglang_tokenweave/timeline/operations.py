"""Gather a step's activities into communication operations, and find when computation ran."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from sglang_tokenweave.timeline import kinds
from sglang_tokenweave.timeline.intervals import Intervals
from sglang_tokenweave.timeline.kinds import Kind, Label
from sglang_tokenweave.timeline.trace import Activity, Lane

COMMUNICATION = (Kind.SUM, Kind.OTHER, Kind.COPY, Kind.NORM, Kind.FLAGS)
_OF_COPY_ENGINE = (Kind.COPY, Kind.NORM, Kind.FLAGS)


class Labelled(NamedTuple):
    """An activity, and what it is."""

    activity: Activity
    label: Label


@dataclass(frozen=True)
class Operation:
    """One communication: a kernel, or the copies, norm and flags that together are one sum."""

    kind: Kind  # SUM or OTHER
    family: str
    activities: tuple[Activity, ...]

    @property
    def start(self) -> int:
        return min(activity.start for activity in self.activities)

    @property
    def intervals(self) -> Intervals:
        return Intervals.of((each.start, each.end) for each in self.activities)


def labelled(activities: Sequence[Activity]) -> tuple[Labelled, ...]:
    """Say of each activity what it is.

    Memory of another GPU may be mapped into this one's addresses. A copy to there can look like
    one within the GPU; it is known by its stream, on which nothing but copies happen, in a step
    that has the norms of the copy engines.
    """
    found = [Labelled(each, kinds.label(each.name, each.category)) for each in activities]
    if not any(each.label.kind is Kind.NORM for each in found):
        return tuple(found)
    busy = {each.activity.lane for each in found if each.label.kind is Kind.COMPUTATION}
    peer = Label(Kind.COPY, "peer copy")
    return tuple(
        Labelled(activity, peer)
        if activity.name.startswith("Memcpy DtoD") and activity.lane not in busy
        else Labelled(activity, label)
        for activity, label in found
    )


def operations(found: Sequence[Labelled]) -> tuple[Operation, ...]:
    """Return the communication operations in the order of their starts."""
    whole = [
        Operation(label.kind, label.family, (activity,))
        for activity, label in found
        if label.kind in (Kind.SUM, Kind.OTHER)
    ]
    pieces = [each for each in found if each.label.kind in _OF_COPY_ENGINE]
    return tuple(sorted([*whole, *_of_copy_engines(pieces)], key=lambda each: each.start))


def computing(found: Sequence[Labelled]) -> Intervals:
    """Return when the GPU computed.

    A kernel that was launched early waits while the communication before it on its own stream still
    runs: there it hides nothing.
    """
    computations: dict[Lane, list[tuple[int, int]]] = defaultdict(list)
    communications: dict[Lane, list[tuple[int, int]]] = defaultdict(list)
    for activity, label in found:
        if label.kind is Kind.COMPUTATION:
            computations[activity.lane].append((activity.start, activity.end))
        elif label.kind in COMMUNICATION:
            communications[activity.lane].append((activity.start, activity.end))
    spans = [
        span
        for lane, pairs in computations.items()
        for span in (Intervals.of(pairs) - Intervals.of(communications[lane])).spans
    ]
    return Intervals.of(spans)


def _of_copy_engines(pieces: Sequence[Labelled]) -> list[Operation]:
    """Group pieces around the norms, of which each operation has one.

    Each operation copies alike: as many copies go before every norm as before the first, and those
    in between belong to the norm before. Flags go with the norm that started last.
    """
    norms = [each.activity for each in pieces if each.label.kind is Kind.NORM]
    copies = [each.activity for each in pieces if each.label.kind is Kind.COPY]
    flags = [each.activity for each in pieces if each.label.kind is Kind.FLAGS]
    if not norms:
        alone = [*copies, *flags]
        return [Operation(Kind.OTHER, "peer copy", (activity,)) for activity in alone]
    starts = [norm.start for norm in norms]
    copied = [copy.start for copy in copies]
    bounds = [bisect_left(copied, start) for start in starts]  # of the copies that follow each norm
    groups: list[list[Activity]] = [copies[: bounds[0]]] + [[] for _ in norms[1:]]
    for index, (begin, end) in enumerate(pairwise([*bounds, len(copies)])):
        is_last = index + 1 == len(norms)
        split = end if is_last else max(begin, end - bounds[0])
        groups[index] += [norms[index], *copies[begin:split]]
        if not is_last:
            groups[index + 1] += copies[split:end]
    for flag in flags:
        groups[max(0, bisect_right(starts, flag.start) - 1)].append(flag)
    return [Operation(Kind.SUM, "tokenweave copies", tuple(group)) for group in groups]
