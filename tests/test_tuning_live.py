"""The guard on live batches: ranks that see different times drop the same plan with one batch."""

import logging
from types import SimpleNamespace

import pytest
import torch
from in_process import World

from sglang_tokenweave.plan import BatchShape, Kind, Mode, PlanRow, PlanTable, plan_batch
from sglang_tokenweave.split import UnsplittableError
from sglang_tokenweave.stats import Stats
from sglang_tokenweave.tuning.live import Live
from sglang_tokenweave.waves import dense_layer

TABLE = PlanTable((PlanRow(Mode.PREFILL, 64, Kind.WEAVE, 8, 16),))
LAYER = dense_layer(4096, 32, 8, 128, 14336, 2)
BATCH = BatchShape(Mode.PREFILL, (100, 200))


class Runtime(SimpleNamespace):
    """The part of a Runtime that decides; batches are shapes already."""

    def __init__(self):
        super().__init__(table=TABLE, stats=Stats(), runs_stock=False, ran=[])

    def kind_in_graph(self, mode, num_tokens):
        return Kind.OFF

    def plan(self, batch):
        if self.runs_stock:
            return None
        if batch is None:
            raise UnsplittableError("no batch at all")
        return batch, plan_batch(batch, self.table, LAYER, 132)

    def run(self, live, batch):
        """Run a batch; return whether it was woven."""

        def original():
            planned = self.plan(batch) if batch else None
            return planned is not None and planned[1].kind is Kind.WEAVE

        return live.forward(original, batch)


class Clock:
    """Says how long a batch took by whether it was woven."""

    def __init__(self, stock_us, woven_us):
        self._times_us = {False: stock_us, True: woven_us}

    def time(self, run):
        is_woven = run()
        return is_woven, lambda: self._times_us[is_woven]


def play(woven_us, batches=96, batch=BATCH):
    """Run batches on two ranks, of which the second one feels how long a woven one takes."""

    def on_rank(group):
        runtime = Runtime()
        live = Live(runtime, group, torch.device("cpu"))
        live._guard.period = 4
        live._clock = Clock(100.0, woven_us if group.rank else 50.0)
        woven = [runtime.run(live, batch) for _ in range(batches)]
        assert not runtime.runs_stock
        return woven, runtime.stats.drops

    outcomes = World(2).run(on_rank)
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes), outcomes
    return outcomes


def test_all_ranks_drop_a_losing_plan_with_the_same_batch(caplog):
    caplog.set_level(logging.WARNING, logger="sglang_tokenweave.tuning.live")
    (one, drops), (other, drops_too) = play(101.0)
    assert one == other
    assert drops == drops_too == {("prefill", "64"): 1}
    # Of four batches two run stock; 18 pairs, and the next sample finds out.
    assert one == [False, False, True, True] * 18 + [False] * 24
    (record,) = caplog.records
    assert "drops a plan that loses on this load: weave of prefill batches from 64 tokens" in (
        record.getMessage()
    )
    assert "in 18 of 18 comparisons" in record.getMessage()


@pytest.mark.parametrize("batch", [BatchShape(Mode.PREFILL, (9,)), None])
def test_batches_that_no_row_plans_are_not_counted(batch):
    for woven, drops in play(101.0, batches=10, batch=batch):
        assert not any(woven)
        assert not drops


def test_a_plan_that_wins_on_all_ranks_stays():
    for woven, drops in play(99.9):  # by so little that its pairs cost nearly nothing
        assert woven[:24] == [False, False, True, True] * 6  # a proof, seen with the pair after it
        assert 12 <= woven.count(False) < 24
        assert not drops


def test_an_error_of_a_batch_passes_and_leaves_the_next_one_alone():
    def on_rank(group):
        runtime = Runtime()
        live = Live(runtime, group, torch.device("cpu"))
        live._guard.period = 4

        def fails():
            raise MemoryError

        with pytest.raises(MemoryError):
            live.forward(fails, BATCH)
        return runtime.runs_stock

    assert World(1).run(on_rank) == [False]
