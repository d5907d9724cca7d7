"""Read what a GPU did out of a profile: the Chrome trace that Kineto writes (torch.profiler)."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_RANGE_CATEGORY = "gpu_user_annotation"
_GZIP_MAGIC = b"\x1f\x8b"


class TraceError(ValueError):
    """A file is no profile, or lacks what is asked of it; the text says what to do."""


class Lane(NamedTuple):
    """A stream of a GPU."""

    device: int
    stream: int


@dataclass(frozen=True)
class Activity:
    """A kernel, copy or fill; times in nanoseconds, as exact as the profile's."""

    lane: Lane
    category: str  # Kineto's `cat`
    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Range:
    """A named part of the program (record_function) as it ran on one stream."""

    lane: Lane
    name: str
    start: int
    end: int
    identity: int | None  # alike on all streams that the part ran on


@dataclass(frozen=True)
class Trace:
    """One rank's profile, in the order of start times."""

    source: str
    activities: tuple[Activity, ...]
    ranges: tuple[Range, ...]

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(sorted({activity.lane.device for activity in self.activities}))

    def of_device(self, device: int | None) -> "Trace":
        """Return one GPU's part; `device` may be None where there is only one.

        Raises:
            TraceError: there is no such GPU, or several to choose from.
        """
        among = ", ".join(map(str, self.devices))
        if device is None and len(self.devices) > 1:
            raise TraceError(f"{self.source}: it shows GPUs {among}; choose one with --device")
        if device is not None and device not in self.devices:
            raise TraceError(f"{self.source}: no GPU {device}; it shows GPUs {among}")
        chosen = self.devices[0] if device is None else device
        return Trace(
            self.source,
            tuple(each for each in self.activities if each.lane.device == chosen),
            tuple(each for each in self.ranges if each.lane.device == chosen),
        )


def load(path: Path) -> Trace:
    """Read a profile, plain or gzip-compressed.

    Raises:
        TraceError: it cannot be read, is no Chrome trace, or shows no GPU.
    """
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    try:
        decoded = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: no Chrome trace, not even JSON: {error}") from error
    return parse(decoded, str(path))


def parse(data: Any, source: str) -> Trace:
    """Take the GPU's activities and ranges out of a decoded Chrome trace.

    Raises:
        TraceError: as of `load`.
    """
    events = data.get("traceEvents") if isinstance(data, dict) else data
    if not isinstance(events, list):
        raise TraceError(f"{source}: no Chrome trace: it has no list `traceEvents`")
    activities, ranges = [], []
    for event, where in _complete(events, source):
        lane, start, end = _lane(event, where), *_times(event, where)
        name = str(event.get("name", ""))
        if event["cat"] == _RANGE_CATEGORY:
            ranges.append(Range(lane, name, start, end, _identity(event)))
        else:
            activities.append(Activity(lane, event["cat"], name, start, end))
    if not activities:
        raise TraceError(
            f"{source}: no GPU activity among {len(events)} events; "
            'profile a server on GPUs, with activities ["CPU", "GPU"]'
        )
    activities.sort(key=lambda each: (each.start, each.end, each.lane, each.name))
    ranges.sort(key=lambda each: (each.start, each.end, each.lane, each.name))
    return Trace(source, tuple(activities), tuple(ranges))


def _complete(events: list[Any], source: str) -> Iterator[tuple[dict[str, Any], str]]:
    wanted = (*_GPU_CATEGORIES, _RANGE_CATEGORY)
    for index, event in enumerate(events):
        if isinstance(event, dict) and event.get("ph") == "X":
            category = str(event.get("cat", "")).lower()
            if category in wanted:
                yield {**event, "cat": category}, f"{source}: traceEvents[{index}]"


def _lane(event: dict[str, Any], where: str) -> Lane:
    """Return the stream: in `args`; of ranges, and of a peer copy the device, in `pid`, `tid`."""
    arguments = event.get("args")
    arguments = arguments if isinstance(arguments, dict) else {}
    device = arguments.get("device", arguments.get("inDevice", event.get("pid")))
    if isinstance(device, str):  # where SGLang merged ranks: "[TP01] 1"
        device = device.rpartition(" ")[2]
    stream = arguments.get("stream", event.get("tid"))
    return Lane(_integer(device, f"{where}: device"), _integer(stream, f"{where}: stream"))


def _times(event: dict[str, Any], where: str) -> tuple[int, int]:
    # Microseconds with three decimals: whole nanoseconds, which a double holds for 100 days.
    start, length = (_nanoseconds(event.get(key), f"{where}: {key}") for key in ("ts", "dur"))
    if length < 0:
        raise TraceError(f"{where}: dur: got {event['dur']}; expected 0 or more microseconds")
    return start, start + length


def _nanoseconds(value: Any, where: str) -> int:
    try:
        return round(float(value) * 1000)
    except (TypeError, ValueError, OverflowError) as error:
        raise TraceError(f"{where}: got {value!r}; expected microseconds") from error


def _integer(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TraceError(f"{where}: got {value!r}; expected an integer") from error


def _identity(event: dict[str, Any]) -> int | None:
    arguments = event.get("args")
    found = arguments.get("External id") if isinstance(arguments, dict) else None
    return found if type(found) is int else None
