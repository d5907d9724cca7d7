"""What a timeline draws, whether as a page or as a picture: lanes, their order, their colours."""

from collections import defaultdict
from dataclasses import dataclass

from sglang_tokenweave.timeline.kinds import Kind
from sglang_tokenweave.timeline.operations import COMMUNICATION, Labelled
from sglang_tokenweave.timeline.overlap import Overlap
from sglang_tokenweave.timeline.trace import Lane

# Told apart by people who do not see red or green, too.
COLOURS = {
    Kind.COMPUTATION: "#b8c4d0",
    Kind.SUM: "#0b5fa5",
    Kind.COPY: "#0b5fa5",
    Kind.NORM: "#5aa0d8",
    Kind.FLAGS: "#5aa0d8",
    Kind.OTHER: "#7b5ea7",
    Kind.MEMORY: "#dddddd",
}
HIDDEN, EXPOSED = "#2a9d8f", "#d1495b"


@dataclass(frozen=True)
class DrawnLane:
    """A stream, and what to call it."""

    title: str
    activities: tuple[Labelled, ...]


def lanes(overlap: Overlap) -> tuple[DrawnLane, ...]:
    """Return the streams of a step: those that compute most first."""
    by_lane: dict[Lane, list[Labelled]] = defaultdict(list)
    for each in overlap.labelled:
        by_lane[each.activity.lane].append(each)
    ordered = sorted(by_lane.items(), key=lambda item: (-_computing(item[1]), item[0]))
    return tuple(
        DrawnLane(f"stream {lane.stream}: {_does(activities)}", tuple(activities))
        for lane, activities in ordered
    )


def _computing(activities: list[Labelled]) -> int:
    return sum(a.end - a.start for a, label in activities if label.kind is Kind.COMPUTATION)


def _does(activities: list[Labelled]) -> str:
    kinds = {label.kind for _, label in activities}
    computes, communicates = Kind.COMPUTATION in kinds, bool(kinds & set(COMMUNICATION))
    if computes and communicates:
        return "both"
    return "computes" if computes else "communicates" if communicates else "memory"
