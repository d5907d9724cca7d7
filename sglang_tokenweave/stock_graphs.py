"""SGLang's own CUDA graphs, captured again with what is planned now.

The fused op runs inside them, and woven decodes do. They are captured before a table is measured,
so what the table changes for their sizes takes another capture.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sglang_tokenweave import seams
from sglang_tokenweave.plan import Kind, Mode
from sglang_tokenweave.runtime import Runtime


@dataclass(frozen=True)
class Taken:
    """Graphs as they were at some time, and what they do."""

    kept: dict[str, dict[Any, Any]]  # by the names that SGLang's backend has for them
    kinds: dict[tuple[Mode, int], Kind]


@dataclass(frozen=True)
class StockGraphs:
    """The graphs of prefill, by tokens, or of decode, by requests."""

    mode: Mode
    runner: Any  # SGLang's
    sizes_name: str  # of the runner's list of sizes
    runtime: Runtime

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return what the graphs are for, the smallest first."""
        return tuple(sorted(getattr(self.runner, self.sizes_name)))

    def size_for(self, num_tokens: int) -> int | None:
        """Return the size of the graph that a batch is padded to; None: it has no graph."""
        return next((size for size in self.sizes if size >= num_tokens), None)

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture the graphs of some sizes again; a collective call of the model's ranks."""
        # As SGLang does at its start: a prefill runner says itself that it captures.
        mode = seams.capture_mode() if self.mode is Mode.DECODE else nullcontext()
        with mode, self._only(sizes):
            self.runner.capture()
        # Between the pieces of a graph SGLang runs attention, on the capture's own stream. No
        # replay waits for that, and would share its memory with it.
        torch.cuda.synchronize()

    @contextmanager
    def _only(self, sizes: Sequence[int]) -> Iterator[None]:
        every = getattr(self.runner, self.sizes_name)
        setattr(self.runner, self.sizes_name, list(sizes))
        try:
            yield
        finally:
            setattr(self.runner, self.sizes_name, every)

    def take(self) -> Taken:
        """Return the graphs as they are now."""
        held = vars(self.runner.backend)
        kept = {name: dict(value) for name, value in held.items() if type(value) is dict}
        return Taken(kept, dict(self.runtime.kinds_in_graphs))

    def put_back(self, taken: Taken) -> None:
        """Let these graphs be replayed from now on."""
        for name, graphs in taken.kept.items():
            setattr(self.runner.backend, name, dict(graphs))
        self.runtime.kinds_in_graphs = dict(taken.kinds)

    def planned(self) -> tuple[int, ...]:
        """Return the sizes whose graphs are not stock, or would not be by the runtime's table."""

        def kinds(size: int) -> set[Kind]:
            planned = self.runtime.plan_in_graph(self.mode, size).kind
            return {planned, self.runtime.kind_in_graph(self.mode, size)}

        return tuple(size for size in self.sizes if kinds(size) != {Kind.OFF})


def find(model_runner: Any, runtime: Runtime) -> tuple[StockGraphs, ...]:
    """Return SGLang's graphs of prefill and of decode, as far as there are any."""
    runners = (
        (Mode.PREFILL, model_runner.prefill_cuda_graph_runner, seams.PREFILL_SIZES),
        (Mode.DECODE, model_runner.decode_cuda_graph_runner, seams.DECODE_SIZES),
    )
    return tuple(
        StockGraphs(mode, runner, sizes_name, runtime)
        for mode, runner, sizes_name in runners
        if getattr(runner, sizes_name, ())
    )
