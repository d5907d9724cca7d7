"""What a batch becomes before the graph of its woven forward is launched, without a GPU."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from batches import make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tokenweave import seams
from sglang_tokenweave.graphs import REQUEST_SLOTS, WovenGraphs
from sglang_tokenweave.plan import BatchShape, Kind, Mode, Plan
from sglang_tokenweave.runtime import Runtime
from sglang_tokenweave.split import cut_batch, cut_requests
from sglang_tokenweave.transport import SymmetricBuffer

SIZE, CUT, HIDDEN, WORLD_SIZE = 48, 24, 4, 2
PLAN = Plan(Kind.WEAVE, CUT, 0, 4, graph_tokens=SIZE)


class Backend:
    """An attention backend that keeps what it was told in the graph."""

    def init_forward_metadata_out_graph(self, batch, in_capture=False):
        self.seen = None if in_capture else batch


class Graphs(WovenGraphs):
    """Launches nothing, there is no GPU, but the preparation of attention."""

    def _record(self, halves, plan, pool, stream):
        return SimpleNamespace(replay=halves[1].prepare)


def make_graphs(rank):
    made = Graphs(
        run=lambda halves, plan: None,
        transport=SimpleNamespace(rank=rank, world_size=WORLD_SIZE),
        buffer=SymmetricBuffer(torch.full((64, HIDDEN), 9.0)),
        backends=[Backend(), Backend()],
        attention_columns=8,
        make_batch=lambda **fields: SimpleNamespace(**fields),
        max_context=100,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seams, "graph_pool", lambda: None)
        patch.setattr(torch.cuda, "Stream", lambda device: None)
        made.capture([(SIZE, PLAN)])
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
    assert [backend.seen for backend in graphs._backends] == [half.batch for half in halves]
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
