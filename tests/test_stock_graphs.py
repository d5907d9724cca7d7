"""SGLang's own graphs, captured again for a candidate or a new table."""

import gc
import importlib
import weakref

import pytest
import torch
from in_process import World
from server import VERSIONS
from sglang_sources import folder
from stand_in_graphs import OurRuntime, fuse_from, is_capturing, server

from sglang_tokenweave import capturing, seams, stock_graphs
from sglang_tokenweave.agreement import DisagreementError
from sglang_tokenweave.plan import Kind, Mode

pytestmark = pytest.mark.usefixtures("no_device")


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
