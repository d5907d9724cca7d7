"""What a batch becomes before the graph of its woven forward is launched, without a GPU."""

import gc
import threading
import weakref
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from batches import make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import World
from server import VERSIONS
from sglang_sources import folder

from sglang_tokenweave import capturing, seams
from sglang_tokenweave.graphs import REQUEST_SLOTS, WovenGraphs, _no_collection
from sglang_tokenweave.plan import BatchShape, GraphShape, Kind, Mode, Plan
from sglang_tokenweave.runtime import Runtime
from sglang_tokenweave.split import cut_batch, cut_requests
from sglang_tokenweave.transport import SymmetricBuffer

SIZE, CUT, HIDDEN, WORLD_SIZE = 48, 24, 4, 2
PLAN = Plan(Kind.WEAVE, CUT, 0, 4, graph_tokens=SIZE)


class Attention:
    """Attention that keeps what it was told, on the host and in the graph."""

    backend = None

    def begin(self, batch, requests):
        self.seen, self.planned = None, None

    def refill(self, batch):
        self.seen = batch

    def plan(self, requests):
        self.planned = requests


class Graphs(WovenGraphs):
    """Launches nothing, there is no GPU, but the preparation of attention."""

    def _record(self, halves, plan):
        return SimpleNamespace(replay=halves[1].prepare)


def make_graphs(rank):
    made = Graphs(
        run=lambda halves, plan: None,
        transport=SimpleNamespace(rank=rank, world_size=WORLD_SIZE),
        buffer=SymmetricBuffer(torch.full((64, HIDDEN), 9.0)),
        attentions=[Attention(), Attention()],
        attention_columns=8,
        make_batch=lambda **fields: SimpleNamespace(**fields),
        max_context=100,
    )
    made.capture(SIZE, PLAN)
    return made


@st.composite
def batches(draw):
    """Return lengths and prefixes of a batch that the graph holds, the second half not empty."""
    num_tokens = draw(st.integers(CUT + 1, SIZE))
    ends = draw(st.sets(st.integers(1, num_tokens - 1), max_size=REQUEST_SLOTS - 1))
    bounds = [0, *sorted(ends), num_tokens]
    lengths = [stop - start for start, stop in pairwise(bounds)]
    return lengths, draw(st.lists(st.integers(0, 50), min_size=len(lengths), max_size=len(lengths)))


def replay(graphs, lengths, prefixes):
    """Return the batch that a replay was given."""
    batch = make_batch(lengths, prefixes)
    graphs.replay(PLAN, batch, cut_requests(batch, CUT))
    return batch


@settings(deadline=None)
@given(before=batches(), now=batches(), rank=st.integers(0, WORLD_SIZE - 1))
def test_the_halves_are_those_of_the_batch_and_nothing_is_left_of_the_one_before(before, now, rank):
    graphs = make_graphs(rank)
    replay(graphs, *before)
    batch = replay(graphs, *now)

    halves = graphs._graphs[SIZE].halves
    assert [each.seen for each in graphs._attentions] == [half.batch for half in halves]
    assert tuple(each.planned for each in graphs._attentions) == cut_requests(batch, CUT)
    for half, part in zip(halves, cut_batch(batch, CUT), strict=True):
        is_padded(half.batch.input_ids, part.input_ids)
        is_padded(half.positions, part.positions)
        is_padded(half.batch.out_cache_loc, part.out_cache_loc)
        assert half.batch.positions is half.positions
        for name in ("seq_lens", "extend_seq_lens", "extend_prefix_lens"):
            is_padded(getattr(half.batch, name), getattr(part, name))
        taken = half.batch.req_pool_indices[: part.batch_size]
        assert torch.equal(taken, part.req_pool_indices)
        assert half.batch.seq_lens_cpu.max() == 100  # so that tables are filled for any request
        assert half.batch.batch_size == REQUEST_SLOTS


@pytest.mark.parametrize(
    ("plan", "in_stock_graph", "overrides"),
    [
        (PLAN, Kind.OFF, True),
        (Plan(Kind.WEAVE, CUT, 0, 4), Kind.OFF, False),
        (Plan(Kind.FUSE, fuse_ctas=4), Kind.OFF, False),
        (Plan(Kind.FUSE, fuse_ctas=4), Kind.FUSE, None),
        (Plan(Kind.OFF), Kind.OFF, None),
        (Plan(Kind.OFF), Kind.FUSE, None),
    ],
)
def test_which_graph_a_batch_may_have(plan, in_stock_graph, overrides):
    runtime = SimpleNamespace(
        plan=lambda batch: (BatchShape(Mode.PREFILL, (SIZE,)), plan),
        kind_in_graph=lambda mode, num_tokens: in_stock_graph,
    )
    assert Runtime.overrides_stock_graph(runtime, batch=None) is overrides


def is_padded(static, rows):
    """Assert that `static` holds `rows` and zeros behind them."""
    assert torch.equal(static[: rows.shape[0]], rows.to(static.dtype))
    assert not static[rows.shape[0] :].any()


@given(
    cuts=st.lists(st.integers(1, 47), min_size=2, max_size=3, unique=True), rank=st.integers(0, 1)
)
@settings(deadline=None)
def test_all_graphs_share_one_residual_and_the_halves_of_each_do_not(cuts, rank):
    graphs = make_graphs(rank)
    for index, cut in enumerate(cuts):
        graphs.capture(SIZE + 1 + index, Plan(Kind.WEAVE, cut, 0, 4))
    memory = graphs._residual
    for woven in graphs._graphs.values():
        a, b = (half.residual for half in woven.halves)
        assert a.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        assert b.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        assert (a.storage_offset(), b.storage_offset()) == (0, a.numel())
        assert a.numel() + b.numel() <= memory.numel()
        for half in woven.halves:
            owned = half.slot.owned_rows(rank, WORLD_SIZE)
            assert half.residual.shape == half.slot.tensor[owned].shape


def test_siblings_share_memory_and_no_graph():
    graphs = make_graphs(0)
    other = graphs.sibling()
    assert (other.shapes, other._graphs) == ((), {})
    other.capture(SIZE, Plan(Kind.WEAVE, CUT + 1, 0, 4))
    assert [shape.cut for shape in (*graphs.shapes, *other.shapes)] == [CUT, CUT + 1]
    for name in ("_input_ids", "_residual", "_attention", "_attentions"):
        assert getattr(other, name) is getattr(graphs, name)


@pytest.mark.parametrize(
    ("seconds", "taken", "captured"),
    [
        ((1, 1), (0, 0), (8, 16, 32, 64)),
        ((1, 25), (0, 0), (16, 32, 64)),  # on the slower rank, 60 are over with the third
        ((1, 1), (0.009, 0.001), (16, 32, 64)),  # likewise of the memory, 0.02 of it
        ((61, 1), (0, 0), (64,)),
    ],
)
def test_what_capturing_may_take_is_bounded_alike_on_all_ranks(
    seconds, taken, captured, monkeypatch, caplog
):
    """The largest sizes are captured until one rank has used up its time or its memory."""
    caplog.set_level("INFO")
    clock = threading.local()
    monkeypatch.setattr(
        capturing, "time", SimpleNamespace(perf_counter=lambda: getattr(clock, "now", 0))
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5000 + getattr(clock, "taken", 0))
    # Another process takes half of the GPU meanwhile, which is not the graphs' doing.
    free = iter(range(1000, 0, -50))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 1000))

    def run(group):
        sizes = (4, 8, 16, 32, 64)
        runner = SimpleNamespace(
            prefill_cuda_graph_runner=SimpleNamespace(capture_num_tokens=sizes)
        )
        place = SimpleNamespace(group=SimpleNamespace(cpu_group=group))
        runtime = SimpleNamespace(
            model=SimpleNamespace(place=place),
            transport=SimpleNamespace(rank=group.rank),
            sizes_to_capture=lambda every: tuple(size for size in every if size > 4),
        )
        graphs = SimpleNamespace(shapes=())

        def add(graphs, model_runner, runtime, size, least_tokens):
            clock.now = getattr(clock, "now", 0) + seconds[group.rank]
            clock.taken = getattr(clock, "taken", 0) + 1000 * taken[group.rank]
            graphs.shapes = (GraphShape(size, 0, 1, least_tokens), *graphs.shapes)

        local[group.rank] = (graphs, add)
        runtime.graphs = None
        assert capturing.num_left_out(runner, runtime) == 4
        runtime.graphs = capturing.capture_all(runner, runtime)
        assert capturing.num_left_out(runner, runtime) == 4 - len(captured)
        return runtime.graphs.shapes

    local = {}
    monkeypatch.setattr(capturing, "_none_yet", lambda _, runtime: local[runtime.transport.rank][0])
    monkeypatch.setattr(
        capturing, "_add", lambda *of, **named: local[of[2].transport.rank][1](*of, **named)
    )
    first, second = World(2).run(run)
    assert first == second
    assert tuple(shape.num_tokens for shape in first) == captured
    assert [shape.least_tokens for shape in first] == [size // 2 + 1 for size in captured]
    (said,) = (text for text in caplog.messages if "TokenWeave captured" in text)
    assert f"{len(captured)} CUDA graphs of {captured[0]} to 64 tokens" in said
    assert ("left out" in said) is (len(captured) < 4)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_release_prepares_fa3_s_prefills_for_graphs(version):
    """What a woven graph uses of fa3: it runs on GPUs only, so its sources are read."""
    root = folder(version) / "sglang" / "srt"
    fa3 = (root / "layers" / "attention" / "flashattention_backend.py").read_text()
    assert "def init_forward_metadata_out_graph(" in fa3
    assert "self._init_full_cg_prefill_metadata(forward_batch, in_capture)" in fa3
    assert "m.max_seq_len_k = self.max_context_len" in fa3  # so the first request's length says it
    assert 'getattr(forward_batch, "_attn_output", None)' in fa3
    batch = (root / "model_executor" / "forward_batch_info.py").read_text()
    assert "    _attn_output: Optional[torch.Tensor] = None" in batch


class Cycle:
    """What only the garbage collector ends."""

    def __init__(self, held):
        self.held, self.itself = held, self


@contextmanager
def collecting_often():
    thresholds = gc.get_threshold()
    gc.set_threshold(10, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_outlives_the_graphs_before_it():
    pool, value = torch.cuda.graph_pool_handle(), torch.zeros(1, device="cuda")
    options = {"pool": pool, "capture_error_mode": "thread_local"}
    old, new = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(old, **options):
        value += 1
    with collecting_often(), _no_collection(), torch.cuda.graph(new, **options):
        Cycle(old)
        del old
        assert len([[] for _ in range(1000)]) == 1000  # more than the thresholds
        value += 2
    new.replay()
    assert value.item() == 2


def test_no_garbage_is_collected_while_a_graph_is_captured(monkeypatch):
    """A graph that is destroyed then, by a collection, fails the capture under way."""
    events = []

    @contextmanager
    def graph(*_, **__):
        events.append("begins")
        yield
        events.append("ends")

    fakes = {
        "Stream": lambda _: SimpleNamespace(wait_stream=lambda _: None),
        "current_stream": lambda: None,
        "stream": lambda _: nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": object,
        "graph": graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(seams, "graph_pool", lambda: None)

    def run(halves, plan):
        if events == ["begins"]:
            weakref.finalize(Cycle(None), events.append, "destroyed")
            assert len([[] for _ in range(1000)]) == 1000  # more than the thresholds

    made = make_graphs(0)
    made._run = run
    with collecting_often():
        WovenGraphs._record(made, (), PLAN)
    assert gc.isenabled()
    gc.collect()
    assert events == ["begins", "ends", "destroyed"]
