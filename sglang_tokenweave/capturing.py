"""Capture the woven forward in CUDA graphs where that can be: on all ranks or on none."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from sglang_tokenweave import captured_attention, refusals, seams, stock_graphs
from sglang_tokenweave.agreement import DisagreementError, as_group, step
from sglang_tokenweave.graphs import REQUEST_SLOTS, WovenGraphs
from sglang_tokenweave.runtime import Runtime
from sglang_tokenweave.stock_graphs import StockGraphs

logger = logging.getLogger(__name__)
# What capturing the weave's graphs may take before a server answers, and what of the GPU's memory
# they may hold.
MOST_S = 60.0
MOST_OF_MEMORY = 0.02
T = TypeVar("T")


def why_not(model_runner: Any, runtime: Runtime) -> str | None:
    """Return why this server has no graphs of the weave, alike on all ranks; None: it can."""
    if not seams.graph_sizes(model_runner):
        return "stock prefill has none"
    if not runtime.model.place.is_whole:
        return "not with a pipeline"
    if seams.has_sliding_window_cache(model_runner):  # its slots are looked up on the CPU
        return "not with a cache for sliding windows"
    return refusals.graph_reason(
        model_runner.prefill_attention_backend_str,
        has_windows=seams.has_sliding_windows(model_runner),
    )


def capture(
    model_runner: Any, runtime: Runtime, size: int, beside: WovenGraphs | None = None
) -> WovenGraphs:
    """Capture the graph of a number of tokens, as the runtime's table has it now.

    A collective call.

    Args:
        beside: graphs of the same model, whose memory the new one shares.

    Raises:
        DisagreementError: on all ranks, if capturing failed on any.
    """
    graphs = _none_yet(model_runner, runtime) if beside is None else beside.sibling()
    _add(graphs, model_runner, runtime, size)
    return graphs


def _none_yet(model_runner: Any, runtime: Runtime) -> WovenGraphs:
    layer = runtime.model.inner.layers[runtime.model.inner.start_layer]
    attention = getattr(layer, runtime.model.architecture.attention)

    def make() -> WovenGraphs:
        return WovenGraphs(
            runtime.weave,
            runtime.transport,
            runtime.buffer,
            captured_attention.make(
                model_runner.prefill_attention_backend_str,
                model_runner,
                request_slots=REQUEST_SLOTS,
                most_rows=min(runtime.buffer.capacity, max(seams.graph_sizes(model_runner))),
                num_sms=runtime.model.num_sms,
            ),
            attention.o_proj.input_size_per_partition,
            partial(seams.forward_batch, model_runner, is_decode=False),
            model_runner.model_config.context_len,
        )

    return step("capturing", runtime.model.place.group.cpu_group, lambda: _say_why(make))


def _add(
    graphs: WovenGraphs, model_runner: Any, runtime: Runtime, size: int, least_tokens: int = 1
) -> None:
    def add() -> None:
        with seams.forward_context(model_runner):
            graphs.capture(size, runtime.plan_to_capture(size), least_tokens)

    step("capturing", runtime.model.place.group.cpu_group, lambda: _say_why(add))


def _say_why(capture: Callable[[], T]) -> T:
    try:
        return capture()
    except Exception as error:  # of kernels, allocators and backends alike
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def capture_again(graphs: StockGraphs, sizes: Sequence[int]) -> None:
    """Capture some of SGLang's own graphs as the runtime's table has it now.

    A collective call.

    Raises:
        DisagreementError: on all ranks, if capturing failed on any; then the graphs are as before.
    """
    group, before = graphs.runtime.model.place.group.cpu_group, graphs.take()
    try:
        step("capturing", group, lambda: _say_why(lambda: graphs.capture(sizes)))
    except DisagreementError:
        graphs.put_back(before)
        raise


def capture_planned(model_runner: Any, runtime: Runtime) -> None:
    """Capture those of SGLang's own graphs again that a new table has something to do in.

    A collective call.

    Raises:
        DisagreementError: as of `capture_again`.
    """
    for graphs in stock_graphs.find(model_runner, runtime):
        sizes = graphs.planned()
        if sizes:
            capture_again(graphs, sizes)


def capture_all(model_runner: Any, runtime: Runtime) -> WovenGraphs | None:
    """Capture for the sizes of stock's graphs that are woven, and say so; None: none is.

    The largest first, which gain the most; when the time or the memory is used up, the others run
    stock. A collective call.

    Raises:
        DisagreementError: on all ranks, if capturing failed on any.
    """
    every = sorted(seams.graph_sizes(model_runner))
    sizes = runtime.sizes_to_capture(every)
    if not sizes:
        return None
    group = as_group(runtime.model.place.group.cpu_group)
    before, began = torch.cuda.memory_reserved(), time.perf_counter()

    def spent() -> tuple[float, int]:
        # By torch's own count: of the GPU's free memory other processes may take some meanwhile.
        return time.perf_counter() - began, torch.cuda.memory_reserved() - before

    graphs = _none_yet(model_runner, runtime)
    for size in reversed(sizes):
        smaller = [each for each in every if each < size]
        _add(graphs, model_runner, runtime, size, least_tokens=max(smaller, default=0) + 1)
        if any(map(_is_too_much, group.gather(spent()))):
            break
    if runtime.transport.rank == 0:
        seconds, taken = spent()
        logger.info(
            "TokenWeave captured %d CUDA graphs of %d to %d tokens in %.1f s, %.2f GiB%s",
            len(graphs.shapes),
            graphs.shapes[0].num_tokens,
            sizes[-1],
            seconds,
            taken / 2**30,
            ""
            if len(graphs.shapes) == len(sizes)
            else f"; that is as much as may be, so {len(sizes) - len(graphs.shapes)} smaller ones "
            "were left out",
        )
    return graphs


def num_left_out(model_runner: Any, runtime: Runtime) -> int:
    """Return how many sizes of stock's graphs would be woven, and have no graph of the weave."""
    captured = {shape.num_tokens for shape in runtime.graphs.shapes} if runtime.graphs else set()
    return len(set(runtime.sizes_to_capture(sorted(seams.graph_sizes(model_runner)))) - captured)


def _is_too_much(spent: tuple[float, int]) -> bool:
    seconds, taken = spent
    return seconds > MOST_S or taken > MOST_OF_MEMORY * torch.cuda.mem_get_info()[1]
