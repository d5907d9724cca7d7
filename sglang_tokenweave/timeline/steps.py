"""Cut a profile into steps: one forward pass each."""

import re
from dataclasses import dataclass, replace

from sglang_tokenweave.timeline.trace import Activity, Range, Trace, TraceError

# SGLang names each pass "step[EXTEND bs=1 toks=4096]"; a torch.profiler schedule, "ProfilerStep#3".
_STEP = (re.compile(r"step\["), re.compile(r"ProfilerStep#"))
WHOLE = "whole profile"


@dataclass(frozen=True)
class Step:
    """What a GPU did in one forward pass, in the order of start times."""

    index: int
    name: str
    activities: tuple[Activity, ...]
    ranges: tuple[Range, ...]

    @property
    def start(self) -> int:
        return min(activity.start for activity in self.activities)

    @property
    def end(self) -> int:
        return max(activity.end for activity in self.activities)


def steps(trace: Trace) -> tuple[Step, ...]:
    """Return the steps that the profile names, or all of it as one if it names none."""
    for pattern in _STEP:
        spans = _spans([each for each in trace.ranges if pattern.match(each.name)])
        found = [_step(trace, *span) for span in spans]
        found = [step for step in found if step.activities]
        if found:
            return tuple(replace(step, index=index) for index, step in enumerate(found))
    return (Step(0, WHOLE, trace.activities, trace.ranges),)


def choose(trace: Trace, index: int | None) -> Step:
    """Return step `index`, or the longest.

    Raises:
        TraceError: there is no such step.
    """
    found = steps(trace)
    if index is None:
        return max(found, key=lambda step: step.end - step.start)
    if not 0 <= index < len(found):
        raise TraceError(
            f"{trace.source}: no step {index}; it has {len(found)}, numbered from 0 (--list)"
        )
    return found[index]


def _spans(ranges: list[Range]) -> list[tuple[str, int, int]]:
    """Return name, start and end of each step: a range has a copy on every stream it ran on."""
    spans: list[tuple[str, int, int]] = []
    index_of: dict[tuple[str, int], int] = {}
    for each in ranges:
        if each.identity is None:
            same = len(spans) - 1 if spans and _overlap(spans[-1], each) else None
        else:
            same = index_of.setdefault((each.name, each.identity), len(spans))
            same = same if same < len(spans) else None
        if same is None:
            spans.append((each.name, each.start, each.end))
        else:
            name, start, end = spans[same]
            spans[same] = name, min(start, each.start), max(end, each.end)
    return spans


def _overlap(span: tuple[str, int, int], each: Range) -> bool:
    return span[0] == each.name and each.start < span[2]


def _step(trace: Trace, name: str, start: int, end: int) -> Step:
    return Step(
        0,
        name,
        tuple(each for each in trace.activities if start <= each.start < end),
        tuple(each for each in trace.ranges if start <= each.start and each.end <= end),
    )
