"""Capture the woven forward in CUDA graphs where that can be: on all ranks or on none."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from sglang_tokenweave import refusals, seams, stock_graphs
from sglang_tokenweave.agreement import DisagreementError, step
from sglang_tokenweave.graphs import WovenGraphs
from sglang_tokenweave.runtime import Runtime
from sglang_tokenweave.stock_graphs import StockGraphs

logger = logging.getLogger(__name__)
T = TypeVar("T")


def why_not(model_runner: Any, runtime: Runtime) -> str | None:
    """Return why this server has no graphs of the weave, alike on all ranks; None: it can."""
    if not seams.graph_sizes(model_runner):
        return "stock prefill has none"
    if not runtime.model.place.is_whole:
        return "not with a pipeline"
    if seams.has_sliding_window_cache(model_runner):  # its slots are looked up on the CPU
        return "not with a cache for sliding windows"
    return refusals.graph_reason(model_runner.prefill_attention_backend_str)


def capture(model_runner: Any, runtime: Runtime, sizes: Sequence[int]) -> WovenGraphs:
    """Capture a graph for each number of tokens, as the runtime's table has it now.

    A collective call.

    Raises:
        DisagreementError: on all ranks, if capturing failed on any.
    """
    layer = runtime.model.inner.layers[runtime.model.inner.start_layer]
    attention = getattr(layer, runtime.model.architecture.attention)

    def make() -> WovenGraphs:
        graphs = WovenGraphs(
            runtime.weave,
            runtime.transport,
            runtime.buffer,
            [seams.captured_attention_backend(model_runner) for _ in range(2)],
            attention.o_proj.input_size_per_partition,
            partial(seams.forward_batch, model_runner, is_decode=False),
            model_runner.model_config.context_len,
        )
        with seams.forward_context(model_runner):
            graphs.capture((size, runtime.plan_to_capture(size)) for size in sizes)
        return graphs

    return step("capturing", runtime.model.place.group.cpu_group, lambda: _say_why(make))


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

    A collective call.

    Raises:
        DisagreementError: on all ranks, if capturing failed on any.
    """
    sizes = runtime.sizes_to_capture(seams.graph_sizes(model_runner))
    if not sizes:
        return None
    free_bytes, began = torch.cuda.mem_get_info()[0], time.perf_counter()
    graphs = capture(model_runner, runtime, sizes)
    if runtime.transport.rank == 0:
        logger.info(
            "TokenWeave captured %d CUDA graphs of up to %d tokens in %.1f s, %.2f GiB",
            len(sizes),
            sizes[-1],
            time.perf_counter() - began,
            (free_bytes - torch.cuda.mem_get_info()[0]) / 2**30,
        )
    return graphs
