"""Streams on which several copies run at once."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from sglang_tokenweave import driver
from sglang_tokenweave.copy_plan import Copy, Lanes


@dataclass(frozen=True)
class CopyLanes:
    """Streams that copy beside an op's own stream, which is the first lane."""

    streams: tuple[Any, ...]
    fork: Any
    joins: tuple[Any, ...]

    @classmethod
    def create(cls, stack: ExitStack, num_lanes: int) -> "CopyLanes":
        """Create streams and events; `stack` owns them."""
        side = range(1, num_lanes)
        streams = tuple(new_stream(stack) for _ in side)
        return cls(streams, new_event(stack), tuple(new_event(stack) for _ in side))

    def copy(self, stream: Any, lanes: Lanes) -> None:
        """Copy on all lanes; `stream` goes on when all have arrived.

        So whatever waits for flags behind them holds up none of them, where streams share a channel
        of the hardware: they are what the peers wait for.
        """
        side = list(zip(self.streams, self.joins, lanes[1:], strict=False))
        if side:
            driver.call("cuEventRecord", self.fork, stream)
        for lane, join, copies in side:
            driver.call("cuStreamWaitEvent", lane, self.fork, 0)
            _copy(lane, copies)
            driver.call("cuEventRecord", join, lane)
        for copies in lanes[:1]:
            _copy(stream, copies)
        for _, join, _ in side:
            driver.call("cuStreamWaitEvent", stream, join, 0)


@dataclass(frozen=True)
class Aside:
    """A stream that copies an op's two pieces while the op's own stream normalises."""

    stream: Any
    begun: Any
    sent: tuple[Any, Any]  # by piece
    normalised: Any
    ended: Any

    @classmethod
    def create(cls, stack: ExitStack) -> "Aside":
        """Create a stream and events; `stack` owns them."""
        begun, first, second, normalised, ended = (new_event(stack) for _ in range(5))
        return cls(new_stream(stack), begun, (first, second), normalised, ended)


def new_stream(stack: ExitStack, priority: int = 0) -> Any:
    """Create a stream that does not wait for the default one; `stack` owns it."""
    flags = driver.bindings().CUstream_flags.CU_STREAM_NON_BLOCKING
    stream = driver.call("cuStreamCreateWithPriority", flags, priority)
    driver.on_exit(stack, "cuStreamDestroy", stream)
    return stream


def new_event(stack: ExitStack) -> Any:
    """Create an event; `stack` owns it."""
    event = driver.call("cuEventCreate", driver.bindings().CUevent_flags.CU_EVENT_DISABLE_TIMING)
    driver.on_exit(stack, "cuEventDestroy", event)
    return event


def order(event: Any, first: Any, second: Any) -> None:
    """Let `second` go on behind what `first` has now."""
    driver.call("cuEventRecord", event, first)
    driver.call("cuStreamWaitEvent", second, event, 0)


def _copy(stream: Any, copies: Sequence[Copy]) -> None:
    for copy in copies:
        driver.call("cuMemcpyAsync", copy.target, copy.source, copy.num_bytes, stream)
