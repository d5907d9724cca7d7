"""Timing: CUDA graphs replayed behind a full queue, in interleaved rounds, slowest rank."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import torch

from benchmarks.cases import REPLAYS

_FILL_CYCLES = 500_000  # about 300 us: the host needs less to queue one round's replays
_WARM_UP_CALLS = 3

Sample = Callable[[], float]  # microseconds per call, in one round


@dataclass(frozen=True)
class Summary:
    """Of one variant's rounds: the median, and the interquartile range around it."""

    time_us: float
    spread_us: float


def round_order(names: Sequence[str], round_index: int) -> list[str]:
    """Return the order of a round: another one each time, the same on every rank."""
    order = list(names)
    random.Random(round_index).shuffle(order)
    return order


def slowest(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Return for every round the time of its slowest rank.

    Raises:
        ValueError: the ranks took different numbers of rounds.
    """
    if len({len(rounds) for rounds in by_rank}) != 1:
        raise ValueError(f"ranks took different rounds: {[len(rounds) for rounds in by_rank]}")
    return [max(times) for times in zip(*by_rank, strict=True)]


def summarize(rounds: Sequence[float]) -> Summary:
    """Return median and interquartile range (0 for a single round).

    Raises:
        ValueError: there are no rounds.
    """
    if not rounds:
        raise ValueError("no rounds to summarize")
    if len(rounds) == 1:
        return Summary(rounds[0], 0.0)
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Summary(median, high - low)


def measure(
    samples: Mapping[str, Sample],
    rounds: int,
    before: Callable[[str, int], None],
    in_time: Callable[[], bool],
) -> dict[str, list[float]]:
    """Take one sample of every variant in each round, after `before(variant, round)`.

    `in_time` is asked after each round, and must answer alike on every rank.
    """
    times: dict[str, list[float]] = {name: [] for name in samples}
    for index in range(rounds):
        for name in round_order(list(samples), index):
            before(name, index)
            times[name].append(samples[name]())
        if not in_time():
            break
    return times


def capture(
    call: Callable[[int], object], calls: int, around: AbstractContextManager[object]
) -> Sample:
    """Capture `call(0)` to `call(calls - 1)` in a CUDA graph; return how to time one of them.

    Args:
        call: enqueues the op once; its argument says on which buffer.
        calls: in the graph.
        around: held open around the capture, for libraries that must know of it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(_WARM_UP_CALLS):
            call(index)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls are forbidden: NCCL's watchdog queries events from its own.
    with around, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for index in range(calls):
            call(index)

    def sample() -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        with torch.cuda.stream(stream):
            # The queue is full before the first replay ends: no time of the host is measured. The
            # untimed replay brings the ranks together, wherever the op itself waits for peers.
            torch.cuda._sleep(_FILL_CYCLES)
            graph.replay()
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
        events[-1].synchronize()
        spans = [a.elapsed_time(b) for a, b in pairwise(events)]
        return float(statistics.median(spans)) * 1e3 / calls

    return sample
