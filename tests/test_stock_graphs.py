"""SGLang's own graphs, captured again for a candidate or a new table.

The runner is a stand-in, because SGLang's captures on GPUs only: its list of sizes, its `capture`
and the dictionaries of its backend are what is used of it.
"""

import gc
import importlib
import pkgutil
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_process import World
from server import VERSIONS
from sglang_sources import folder

from sglang_tokenweave import capturing, dummy, seams, stock_graphs
from sglang_tokenweave.agreement import DisagreementError
from sglang_tokenweave.plan import Kind, Mode, PlanRow, PlanTable
from sglang_tokenweave.runtime import Runtime
from sglang_tokenweave.tuning.measure import Meter, NotMeasurableError, differ
from sglang_tokenweave.tuning.table import OFF, Candidate
from sglang_tokenweave.waves import GemmShape, LayerShape
from sglang_tokenweave.weave import Stage

FUSE_8, FUSE_16 = (Candidate(Kind.FUSE, fuse_ctas=ctas) for ctas in (8, 16))
WEAVE = Candidate(Kind.WEAVE, ctas=8, fuse_ctas=16)
NOTHING = PlanTable(())
LAYER = LayerShape((GemmShape("g", n=1024, k=1024),))


def is_capturing():
    return pkgutil.resolve_name(
        "sglang.srt.model_executor.runner_utils.capture_mode:get_is_capture_mode"
    )()


@dataclass(frozen=True)
class OurModel:
    """The part of a runtime's Model that is used here."""

    place: Any
    inner: Any
    stages: tuple[Stage, ...]
    layer: LayerShape = LAYER
    num_sms: int = 132


def model_of(group, layers=4):
    place = SimpleNamespace(group=SimpleNamespace(cpu_group=group), is_whole=True)
    modules = torch.nn.ModuleList(torch.nn.Identity() for _ in range(layers))
    inner = SimpleNamespace(start_layer=0, end_layer=layers, layers=modules)
    names = ("embedding", *(f"{part} {i}" for i in range(layers) for part in ("attn", "mlp")))
    return OurModel(place, inner, tuple(Stage(name, f"norm after {name}") for name in names))


class OurRuntime(SimpleNamespace):
    """The part of a Runtime that knows what is in SGLang's graphs."""

    kind_in_graph = Runtime.kind_in_graph
    plan_in_graph = Runtime.plan_in_graph

    def __init__(self, group=None, layers=4):
        super().__init__(
            table=NOTHING,
            graphs=None,
            stats=None,
            kinds_in_graphs={},
            cuts_captured_decodes=True,
            buffer=SimpleNamespace(capacity=512),
            model=model_of(group, layers),
        )


class Runner:
    """Captures what the runtime plans for each of its sizes: a kind and its CTAs."""

    def __init__(self, mode, sizes_name, sizes, runtime):
        self.mode, self.sizes_name, self.runtime = mode, sizes_name, runtime
        self.backend = SimpleNamespace(graphs={}, outputs={}, pool="a pool")
        self.fails_at = None
        self.depths = {}  # layers of each size's last capture
        self.said_so = False  # that it captures, as SGLang's code asks
        self.is_done = True  # what runs beside its graphs' pieces while they are captured
        setattr(self, sizes_name, sizes)
        self.capture()

    def capture(self):
        self.said_so = is_capturing()
        self.is_done = False
        for size in reversed(getattr(self, self.sizes_name)):
            plan = self.runtime.plan_in_graph(self.mode, size)
            self.runtime.kinds_in_graphs[self.mode, size] = plan.kind
            if size == self.fails_at:
                raise MemoryError("no memory left")
            self.backend.graphs[size] = (plan.kind, plan.fuse_ctas)
            self.depths[size] = self.runtime.model.inner.end_layer
            self.backend.outputs[size] = f"rows of {size}"


def server(runtime, table=NOTHING):
    """Return a ModelRunner whose graphs were captured with a table."""
    runtime.table = table
    return SimpleNamespace(
        device="cuda",
        attn_backend=SimpleNamespace(use_sliding_window_kv_pool=False),
        sliding_window_size=None,
        prefill_attention_backend_str="fa3",
        prefill_cuda_graph_runner=Runner(
            Mode.PREFILL, "capture_num_tokens", [64, 128, 512], runtime
        ),
        decode_cuda_graph_runner=Runner(Mode.DECODE, "capture_bs", [1, 2, 4], runtime),
    )


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def fuse_from(tokens, mode=Mode.PREFILL, ctas=16):
    return PlanTable((PlanRow(mode, tokens, Kind.FUSE, fuse_ctas=ctas),))


def test_what_there_is_and_which_graph_holds_a_batch():
    runtime = OurRuntime()
    model_runner = server(runtime)
    prefill, decode = stock_graphs.find(model_runner, runtime)
    assert (prefill.mode, prefill.sizes) == (Mode.PREFILL, (64, 128, 512))
    assert [prefill.size_for(tokens) for tokens in (1, 64, 65, 513)] == [64, 64, 128, None]
    model_runner.prefill_cuda_graph_runner = None
    assert stock_graphs.find(model_runner, runtime) == (decode,)


def test_graphs_of_some_sizes_are_captured_again_and_put_back():
    runtime = OurRuntime()
    prefill, _ = stock_graphs.find(server(runtime), runtime)
    stock = prefill.take()
    runtime.table = fuse_from(1)
    prefill.capture((128,))
    backend = prefill.runner.backend
    assert backend.graphs == {64: (Kind.OFF, 0), 128: (Kind.FUSE, 16), 512: (Kind.OFF, 0)}
    assert prefill.sizes == (64, 128, 512)
    assert runtime.kind_in_graph(Mode.PREFILL, 100) is Kind.FUSE
    fused = prefill.take()
    prefill.put_back(stock)
    assert set(backend.graphs.values()) == {(Kind.OFF, 0)}
    assert runtime.kind_in_graph(Mode.PREFILL, 100) is Kind.OFF
    prefill.put_back(fused)
    assert backend.graphs[128] == (Kind.FUSE, 16)
    assert backend.pool == "a pool"


def test_a_capture_is_over_before_a_graph_is_replayed(monkeypatch):
    """Attention between the pieces runs on the capture's stream, for which no replay waits."""
    runtime = OurRuntime()
    for graphs in stock_graphs.find(server(runtime), runtime):

        def finish(runner=graphs.runner):
            runner.is_done = True

        monkeypatch.setattr(torch.cuda, "synchronize", finish)
        graphs.capture(graphs.sizes[:1])
        assert graphs.runner.is_done


def test_warm_ups_of_decode_graphs_count_as_captures():
    """A prefill runner says so itself; a decode runner was told at SGLang's start, outside."""
    runtime = OurRuntime()
    for graphs in stock_graphs.find(server(runtime), runtime):
        graphs.capture(graphs.sizes[:1])
        assert graphs.runner.said_so is (graphs.mode is Mode.DECODE)
    assert not is_capturing()


def test_a_search_has_no_collection_of_all_objects_for_each_capture():
    runners = [
        importlib.import_module(f"sglang.srt.model_executor.runner.{name}_cuda_graph_runner")
        for name in ("prefill", "decode")
    ]
    before = [runner.freeze_gc for runner in runners]
    for runner in runners:  # what is got around
        with runner.freeze_gc(False):
            assert gc.get_freeze_count() > 10_000
        assert gc.get_freeze_count() == 0
    with seams.few_collections():
        for runner in runners:
            dead = Dead()
            dead.itself, seen = dead, weakref.ref(dead)
            del dead
            with runner.freeze_gc(False):
                assert seen() is None  # of what came since: nothing is destroyed in a capture
            assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0
    assert [runner.freeze_gc for runner in runners] == before


class Dead:
    """Holds itself, so that only a collection frees it."""


def test_a_new_table_renews_the_graphs_that_it_puts_the_op_in_or_out_of():
    runtime = OurRuntime()

    def renew(group):
        runtime.model.place.group.cpu_group = group
        model_runner = server(runtime, fuse_from(128, ctas=8))
        runtime.table = fuse_from(512, ctas=32)
        capturing.capture_planned(model_runner, runtime)
        return model_runner.prefill_cuda_graph_runner.backend.graphs

    (graphs,) = World(1).run(renew)
    assert graphs == {64: (Kind.OFF, 0), 128: (Kind.OFF, 0), 512: (Kind.FUSE, 32)}
    assert runtime.kind_in_graph(Mode.PREFILL, 100) is Kind.OFF


def test_if_one_rank_cannot_capture_all_keep_the_graphs_that_they_had():
    def renew(group):
        runtime = OurRuntime(group)
        model_runner = server(runtime)
        prefill, _ = stock_graphs.find(model_runner, runtime)
        prefill.runner.fails_at = 64 if group.rank == 1 else None
        runtime.table = fuse_from(1)
        with pytest.raises(DisagreementError, match=r"rank 1: .*no memory left"):
            capturing.capture_planned(model_runner, runtime)
        return set(prefill.runner.backend.graphs.values()), set(runtime.kinds_in_graphs.values())

    assert World(2).run(renew) == 2 * [({(Kind.OFF, 0)}, {Kind.OFF})]


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


@pytest.mark.parametrize("version", VERSIONS)
def test_every_release_has_what_is_used_of_its_runners(version):
    srt = folder(version) / "sglang" / "srt"
    root = srt / "model_executor"
    model_runner = (root / "model_runner.py").read_text()
    for name, sizes_name in (("prefill", seams.PREFILL_SIZES), ("decode", seams.DECODE_SIZES)):
        assert f"self.{name}_cuda_graph_runner = " in model_runner
        runner = (root / "runner" / f"{name}_cuda_graph_runner.py").read_text()
        assert "    def capture(self) -> None:" in runner
        assert f"reversed(self.{sizes_name})" in runner  # all that it captures
        assert runner.count("with freeze_gc(") == 1  # found in the module, and so ours meanwhile
    for name in ("llama", "qwen2", "qwen2_moe", "mixtral"):  # the others inherit their loop
        model = (srt / "models" / f"{name}.py").read_text()
        assert "for i in range(self.start_layer, self.end_layer):" in model
        assert "self.layers[i]" in model
    for name in ("full", "breakable"):
        backend = (root / "runner_backend" / f"{name}_cuda_graph_backend.py").read_text()
        assert "self._graphs: Dict[" in backend
        assert "self._graphs[shape_key].replay()" in backend
