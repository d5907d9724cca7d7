"""What the tuner times: each candidate in the graph that it would have, and checked before."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from in_process import World
from stand_in_graphs import NOTHING, OurRuntime, fuse_from, server

from sglang_tokenweave import capturing, dummy
from sglang_tokenweave.plan import Kind, Mode
from sglang_tokenweave.tuning import measure as measure_module
from sglang_tokenweave.tuning.measure import Meter, NotMeasurableError, differ
from sglang_tokenweave.tuning.table import OFF, Candidate

FUSE_8, FUSE_16 = (Candidate(Kind.FUSE, fuse_ctas=ctas) for ctas in (8, 16))
WEAVE = Candidate(Kind.WEAVE, ctas=8, fuse_ctas=16)


pytestmark = pytest.mark.usefixtures("no_device")


def meter(group, table=NOTHING, layers=4):
    runtime = OurRuntime(group, layers)
    model_runner = server(runtime, table)
    return Meter(model_runner, runtime, group), model_runner, runtime


def test_each_candidate_is_timed_in_the_graph_that_it_would_have(monkeypatch):
    monkeypatch.setattr(capturing, "capture", lambda *_: "woven graphs")

    def prepare(group):
        timer, model_runner, runtime = meter(group)
        prefill = model_runner.prefill_cuda_graph_runner.backend
        decode = model_runner.decode_cuda_graph_runner.backend
        seen = []
        for candidate in (OFF, FUSE_8, FUSE_16, OFF, FUSE_8, WEAVE):
            timer._bring_about(candidate, Mode.PREFILL, 100)
            seen.append((prefill.graphs[128], runtime.graphs))
        timer._bring_about(FUSE_16, Mode.DECODE, 4)
        assert decode.graphs[4] == (Kind.FUSE, 16)
        timer._bring_about(WEAVE, Mode.DECODE, 4)
        assert decode.graphs[4] == (Kind.WEAVE, 16)
        timer._bring_about(FUSE_16, Mode.DECODE, 5)  # there is no such graph: launch by launch
        return seen

    (seen,) = World(1).run(prepare)
    off, fuse_8, fuse_16 = ((Kind.OFF, 0), None), ((Kind.FUSE, 8), None), ((Kind.FUSE, 16), None)
    assert seen[:5] == [off, fuse_8, fuse_16, off, fuse_8]
    assert seen[5][1] == "woven graphs"


def test_off_is_stock_also_where_thresholds_fuse():
    def prepare(group):
        timer, model_runner, _ = meter(group, fuse_from(1))
        graphs = model_runner.prefill_cuda_graph_runner.backend
        timer._bring_about(OFF, Mode.PREFILL, 64)
        during = dict(graphs.graphs)
        with timer._aside():
            pass
        return during, graphs.graphs

    ((during, after),) = World(1).run(prepare)
    assert during == {64: (Kind.OFF, 0), 128: (Kind.FUSE, 16), 512: (Kind.FUSE, 16)}
    assert set(after.values()) == {(Kind.FUSE, 16)}


def test_of_a_deep_model_the_first_layers_and_the_last_are_timed():
    def prepare(group):
        timer, model_runner, runtime = meter(group, layers=20)
        prefill = model_runner.prefill_cuda_graph_runner
        stages, layers = runtime.model.stages, runtime.model.inner.layers
        with timer._aside():
            assert runtime.model.stages[:-3] == stages[:14]
            assert runtime.model.stages[-2:] == stages[-2:]
            assert list(runtime.model.inner.layers) == [*layers[:7], layers[19]]
            timer._bring_about(OFF, Mode.PREFILL, 100)
            assert prefill.depths == {64: 20, 128: 8, 512: 20}
            during = dict(prefill.backend.graphs)
            timer._bring_about(OFF, Mode.PREFILL, 100)
        assert runtime.model.stages == stages
        assert (runtime.model.inner.end_layer, runtime.model.inner.layers) == (20, layers)
        return during, timer._agree([[1.0, 2.0]], [])

    ((during, times),) = World(1).run(prepare)
    assert during == dict.fromkeys((64, 128, 512), (Kind.OFF, 0))
    assert times == [[2.5, 5.0]]


def test_of_a_model_that_is_not_deep_all_layers_are_timed():
    def prepare(group):
        timer, model_runner, runtime = meter(group, layers=8)
        before = runtime.model.stages
        with timer._aside():
            assert runtime.model.stages == before
            timer._bring_about(OFF, Mode.PREFILL, 100)
        assert set(model_runner.prefill_cuda_graph_runner.depths.values()) == {8}
        return timer._agree([[1.0, 2.0]], [])

    assert World(1).run(prepare) == [[[1.0, 2.0]]]


def test_a_graph_that_cannot_be_captured_ends_the_measurement():
    def prepare(group):
        timer, model_runner, _ = meter(group)
        model_runner.prefill_cuda_graph_runner.fails_at = 64
        timer._bring_about(FUSE_8, Mode.PREFILL, 64)

    (error,) = World(1).run(prepare)
    assert isinstance(error, NotMeasurableError)
    assert "no memory left" in str(error)


@pytest.fixture
def batches(monkeypatch):
    """Let batches be made of nothing."""
    monkeypatch.setattr(dummy, "lengths", lambda *_: (1,))
    monkeypatch.setattr(dummy, "borrowed_rows", lambda *_: nullcontext([torch.zeros(1)]))
    monkeypatch.setattr(dummy, "batch", lambda *_: "batch")


def test_a_pass_that_fails_ends_the_measurement_on_all_ranks(batches):
    def fail(batch):
        raise MemoryError("no memory left")

    def measure(group):
        timer, model_runner, runtime = meter(group)
        model_runner.forward = fail if group.rank == 1 else lambda batch: None
        with pytest.raises(NotMeasurableError, match="MemoryError: no memory left"):
            timer.measure([OFF], Mode.DECODE, 8, 0)
        assert runtime.table == NOTHING
        return True

    assert World(2).run(measure) == [True, True]


def test_a_candidate_that_gives_other_logits_than_stock_is_not_timed(batches):
    stock = torch.randn(16, 100, generator=torch.Generator().manual_seed(0))

    def measure(group):
        timer, model_runner, runtime = meter(group)

        def forward(batch):
            (row,) = runtime.table.rows
            is_wrong = row.fuse_ctas == 16 and group.rank == 1
            logits = stock.flip(0) if is_wrong else stock * (1 + 1e-2 * row.fuse_ctas)
            output = SimpleNamespace(next_token_logits=logits)
            return SimpleNamespace(logits_output=output)

        model_runner.forward = forward
        times = timer.measure([OFF, FUSE_8], Mode.DECODE, 8, 2)  # a hundredth per CTA is rounding
        with pytest.raises(NotMeasurableError, match="fuse of a decode of 8 tokens gives other"):
            timer.measure([OFF, FUSE_8, FUSE_16], Mode.DECODE, 8, 0)
        return [len(each) for each in times]

    assert World(2).run(measure) == 2 * [[2, 2]]


def test_what_a_candidate_follows_changes_and_its_time_is_its_own(batches, monkeypatch):
    """A GPU at its power limit gives more to what follows a batch that took less."""
    monkeypatch.setattr(measure_module, "_time_us", lambda runs, *_: runs[0]().ctas)
    tried = [OFF, FUSE_8, FUSE_16]

    def measure(group):
        timer, model_runner, runtime = meter(group)
        ran = []

        def forward(batch):
            (row,) = runtime.table.rows
            ran.append(row.fuse_ctas)
            output = SimpleNamespace(next_token_logits=torch.ones(4, 8))
            return SimpleNamespace(logits_output=output, ctas=row.fuse_ctas)

        model_runner.forward = forward
        timer.measure(tried, Mode.DECODE, 8, 0)
        ran.clear()
        times = timer.measure(tried, Mode.DECODE, 8, 6)
        return times, [tuple(ran[start : start + 3]) for start in range(0, len(ran), 3)]

    (times, rounds), other = World(2).run(measure)
    assert other == (times, rounds)
    assert times == [6 * [0], 6 * [8], 6 * [16]]
    assert all(sorted(each) == [0, 8, 16] for each in rounds)
    assert len(set(rounds)) > 2


def test_what_another_size_left_behind_is_not_captured_anew_inside_of_rounds(batches):
    """What preparing takes would be taken for what a round takes."""

    def measure(group):
        timer, model_runner, _ = meter(group, layers=20)
        decode = model_runner.decode_cuda_graph_runner
        captures = []
        capture = decode.capture
        decode.capture = lambda: (captures.append(1), capture())
        logits = SimpleNamespace(next_token_logits=torch.ones(4, 8))
        model_runner.forward = lambda batch: SimpleNamespace(logits_output=logits)
        seen = []
        for requests, rounds in ((2, 0), (4, 0), (2, 0), (2, 3)):
            captures.clear()
            timer.measure([OFF, FUSE_8], Mode.DECODE, requests, rounds)
            seen.append(len(captures))
        return seen

    assert World(1).run(measure) == [[2, 2, 2, 0]]


def test_what_counts_as_other_logits():
    stock = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(8, 1000, generator=torch.Generator().manual_seed(1))
    assert not differ(stock, stock)
    assert not differ(stock + 0.4 * noise, stock)
    assert differ(noise, stock)
    assert differ(torch.zeros_like(stock), stock)
    assert differ(torch.full_like(stock, torch.nan), stock)
    assert not differ(torch.zeros(1, 9), torch.zeros(1, 9))
    assert not differ(noise, torch.full_like(stock, torch.inf))  # stock itself overflows
