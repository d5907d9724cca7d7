"""Time what a device does: on a GPU by events on the stream, else by the wall's clock."""

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Clock(Protocol):
    """Times work without waiting for it."""

    def time(self, run: Callable[[], T]) -> tuple[T, Callable[[], float]]:
        """Return what `run` does, and what waits for the work it started and returns its us."""


def clock_of(device: torch.device) -> Clock:
    """Return the clock for work on a device."""
    return _EventClock() if device.type == "cuda" else _WallClock()


class _WallClock:
    """Times what is over when it returns."""

    def time(self, run: Callable[[], T]) -> tuple[T, Callable[[], float]]:
        began = time.perf_counter()
        result = run()
        us = (time.perf_counter() - began) * 1e6
        return result, lambda: us


class _EventClock:
    """Times on the current stream: side streams of the work are joined to it."""

    def time(self, run: Callable[[], T]) -> tuple[T, Callable[[], float]]:
        event: Any = torch.cuda.Event  # untyped
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        result = run()
        end.record()

        def read_us() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) * 1000

        return result, read_us
