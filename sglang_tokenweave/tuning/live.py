"""Feed the guard with the times of live batches, and let what it drops run stock."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sglang_tokenweave.agreement import Group
from sglang_tokenweave.plan import Kind, PlanRow
from sglang_tokenweave.runtime import Runtime
from sglang_tokenweave.split import UnsplittableError
from sglang_tokenweave.tuning.clock import clock_of
from sglang_tokenweave.tuning.guard import Guard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sample:
    """A batch that was timed."""

    row: PlanRow
    is_stock: bool
    num_tokens: int
    read_us: Callable[[], float]  # waits for the end of the batch on its device


class Live:
    """Stands around `ModelRunner.forward`, which every batch goes through, in a graph or not."""

    def __init__(self, runtime: Runtime, group: Group, device: torch.device) -> None:
        """Watch the plans of `runtime`; `group` holds its ranks, and nobody else uses it."""
        self._runtime = runtime
        self._group = group
        self._clock = clock_of(device)
        self._guard = Guard()
        self._samples: list[_Sample] = []

    def forward(self, original: Callable[[], Any], batch: Any) -> Any:
        """Run a batch: as planned, or stock because it is compared or because its plan lost.

        Raises:
            LostRankError: some rank did not compare; once in a period of batches they do.
        """
        row, num_tokens = self._row(batch)
        if row is None:
            return original()
        is_stock = self._guard.runs_stock(row)
        self._runtime.runs_stock = is_stock
        try:
            if not self._guard.is_sampled(row):
                return original()
            if is_stock:  # the pairs before this one are long over, on the device too
                self._settle()
            result, read_us = self._clock.time(original)
        finally:
            self._runtime.runs_stock = False
        self._samples.append(_Sample(row, is_stock, num_tokens, read_us))
        return result

    def _row(self, batch: Any) -> tuple[PlanRow | None, int]:
        """Return the row of the table that a batch is not left alone by, and its tokens."""
        try:
            planned = self._runtime.plan(batch)
        except UnsplittableError:
            return None, 0
        if planned is None or planned[1].kind is Kind.OFF:
            return None, 0
        shape, _ = planned
        if self._runtime.kind_in_graph(shape.mode, shape.num_tokens) is not Kind.OFF:
            return None, 0  # captured: there is no stock to compare with
        return self._runtime.table.lookup(shape.mode, shape.num_tokens), shape.num_tokens

    def _settle(self) -> None:
        """Give the guard the times of the slowest ranks; all ranks come here at the same batch."""
        samples, self._samples = self._samples, []
        if not samples:
            return
        ranks = self._group.gather([sample.read_us() for sample in samples])
        for sample, *times in zip(samples, *ranks, strict=True):
            if self._guard.add(
                sample.row,
                is_stock=sample.is_stock,
                us=max(times),
                num_tokens=sample.num_tokens,
            ):
                self._say(sample.row)

    def _say(self, row: PlanRow) -> None:
        self._runtime.stats.drops[row.mode.value, str(row.min_tokens)] += 1
        bucket = self._guard.buckets[row]
        if self._group.rank == 0:
            logger.warning(
                "TokenWeave drops a plan that loses on this load: %s of %s batches from %d tokens "
                "on was slower than stock in %d of %d comparisons; they run stock from now on",
                row.kind,
                row.mode,
                row.min_tokens,
                bucket.lost,
                bucket.pairs,
            )
