"""The planner: what is planned, that every rank plans it alike, and what it refuses."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tokenweave.plan import (
    BatchShape,
    GraphShape,
    Kind,
    Mode,
    Plan,
    PlanRow,
    PlanTable,
    plan_batch,
    plan_unsplit,
    where_cut,
)
from sglang_tokenweave.waves import GemmShape, LayerShape, best_cut, dense_layer

LAYER = dense_layer(4096, 32, 8, 128, 14336, 2)
TABLE = PlanTable.from_thresholds(
    min_tokens=1024, fuse_min_tokens=64, decode_min_tokens=256, ctas=8, fuse_ctas=16
)
WEAVE_ALL = PlanTable.from_thresholds(
    min_tokens=1, fuse_min_tokens=0, decode_min_tokens=1, ctas=4, fuse_ctas=12
)

rows = st.builds(
    PlanRow,
    mode=st.sampled_from(Mode),
    min_tokens=st.integers(1, 40),
    kind=st.sampled_from(Kind),
    ctas=st.integers(0, 16),
    fuse_ctas=st.integers(0, 32),
)
tables = st.lists(rows, max_size=8, unique_by=lambda row: (row.mode, row.min_tokens)).map(
    lambda rows: PlanTable(tuple(rows))
)
long_batches = st.builds(
    BatchShape,
    mode=st.sampled_from((Mode.PREFILL, Mode.MIXED)),
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=6).map(tuple),
)
small_batches = st.builds(
    BatchShape,
    mode=st.sampled_from((Mode.PREFILL, Mode.MIXED)),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple),
)
decode_batches = st.builds(
    BatchShape,
    mode=st.just(Mode.DECODE),
    lengths=st.integers(1, 500).map(lambda requests: (1,) * requests),
)


def prefill(*lengths):
    return BatchShape(Mode.PREFILL, lengths)


@given(long_batches | small_batches | decode_batches, st.sampled_from((1, 2, 16)))
@settings(deadline=None)
def test_every_batch_that_can_be_cut_is_woven_where_the_table_says_so(batch, align):
    plan = plan_batch(batch, WEAVE_ALL, LAYER, 132, align=align)
    if batch.num_tokens <= align:
        assert plan.kind is Kind.OFF
        assert plan.cut == plan.ctas == plan.fuse_ctas == 0
        assert plan.reason == f"too few tokens to cut at a multiple of {align}"
        return
    assert 0 < plan.cut < batch.num_tokens
    assert plan.cut % align == 0
    assert plan == Plan(Kind.WEAVE, plan.cut, ctas=4, fuse_ctas=12)
    assert plan.cut == best_cut(batch.lengths, LAYER, 132 - 4, align)
    if batch.mode is Mode.DECODE:
        assert where_cut(batch, plan.cut) == "between"


@given(tables, small_batches | decode_batches)
@settings(deadline=None)
def test_a_plan_does_what_the_row_says(table, batch):
    plan = plan_batch(batch, table, LAYER, 132)
    row = table.lookup(batch.mode, batch.num_tokens)
    kind = row.kind if row else Kind.OFF
    assert (plan.cut > 0) == (plan.kind is Kind.WEAVE)
    if kind is not Kind.WEAVE or batch.num_tokens > 1:
        assert plan.kind is kind
        assert plan.ctas == (row.ctas if kind is Kind.WEAVE else 0)
        assert plan.fuse_ctas == (row.fuse_ctas if kind is not Kind.OFF else 0)
    else:
        assert plan.kind is not Kind.WEAVE
    assert bool(plan.reason) == (plan.kind is Kind.OFF or plan.kind is not kind)


def test_thresholds():
    def kinds(mode, table=TABLE):
        sizes = (1, 63, 64, 255, 256, 1023, 1024, 9000)
        shapes = [(1,) * n if mode is Mode.DECODE else (n,) for n in sizes]
        plans = [plan_batch(BatchShape(mode, shape), table, LAYER, 132) for shape in shapes]
        return "".join({"off": ".", "fuse": "f", "weave": "w"}[plan.kind] for plan in plans)

    assert kinds(Mode.PREFILL) == "..ffffww"
    assert kinds(Mode.MIXED) == "..ffffww"
    assert kinds(Mode.DECODE) == "..ffwwww"

    def fusing_from(size):
        return PlanTable.from_thresholds(
            min_tokens=256, fuse_min_tokens=size, decode_min_tokens=0, ctas=8, fuse_ctas=16
        )

    assert kinds(Mode.PREFILL, fusing_from(0)) == "....wwww"
    assert kinds(Mode.DECODE, fusing_from(0)) == "........"
    assert kinds(Mode.DECODE, fusing_from(64)) == "..ffffff"
    # FUSE from where WEAVE already began: nothing is left for it.
    assert kinds(Mode.PREFILL, fusing_from(300)) == "....wwww"


def test_a_batch_that_cannot_be_cut_is_fused_if_the_table_fuses_at_that_size():
    rows = (PlanRow(Mode.DECODE, 1, Kind.WEAVE, 8, 16),)
    assert plan_batch(BatchShape(Mode.DECODE, (1,)), PlanTable(rows), LAYER, 132).kind is Kind.OFF
    table = PlanTable(
        (PlanRow(Mode.PREFILL, 4, Kind.FUSE, 0, 20), PlanRow(Mode.PREFILL, 16, Kind.WEAVE, 8, 16))
    )
    plan = plan_batch(prefill(30), table, LAYER, 132, align=32)
    reason = "too few tokens to cut at a multiple of 32"
    assert plan == Plan(Kind.FUSE, fuse_ctas=20, reason=reason)


def test_a_row_that_does_not_fall_back_leaves_what_cannot_be_cut_to_stock():
    rows = (
        PlanRow(Mode.PREFILL, 4, Kind.FUSE, 0, 20),
        PlanRow(Mode.PREFILL, 16, Kind.WEAVE, 8, 16, falls_back=False),
        PlanRow(Mode.PREFILL, 64, Kind.FUSE, 0, 20),
    )
    table = PlanTable(rows)
    reason = "too few tokens to cut at a multiple of 32"
    assert plan_batch(prefill(30), table, LAYER, 132, align=32) == Plan(Kind.OFF, reason=reason)
    reason = "woven in the table, and nothing was measured to be faster uncut"
    assert plan_unsplit(Mode.PREFILL, 30, table) == Plan(Kind.OFF, reason=reason)
    for num_tokens in (4, 64):
        assert plan_unsplit(Mode.PREFILL, num_tokens, table).kind is Kind.FUSE


def test_a_one_shot_op_takes_few_tokens_whoever_plans():
    table = PlanTable((PlanRow(Mode.PREFILL, 1, Kind.FUSE),))
    for plan in (
        plan_batch(prefill(512), table, LAYER, 132),
        plan_unsplit(Mode.PREFILL, 512, table),
    ):
        assert plan == Plan(Kind.FUSE)
        assert plan.is_one_shot
    reason = "more than the 512 tokens of a one-shot op"
    for plan in (
        plan_batch(prefill(513), table, LAYER, 132),
        plan_unsplit(Mode.PREFILL, 513, table),
    ):
        assert plan == Plan(Kind.OFF, reason=reason)
        assert not plan.is_one_shot


def test_off_has_a_reason():
    assert plan_batch(prefill(5), TABLE, LAYER, 132).reason == (
        "smaller than any prefill row of the table"
    )
    off = PlanTable((PlanRow(Mode.DECODE, 1, Kind.OFF),))
    assert plan_batch(BatchShape(Mode.DECODE, (1,)), off, LAYER, 132).reason == "off in the table"


@given(tables, st.sampled_from(Mode), st.integers(0, 50))
@settings(deadline=None)
def test_lookup_finds_the_last_row_that_has_begun(table, mode, num_tokens):
    own = [row for row in table.rows if row.mode is mode]
    if mode is Mode.MIXED and not own:
        own = [row for row in table.rows if row.mode is Mode.PREFILL]
    begun = {row.min_tokens: row for row in own if row.min_tokens <= num_tokens}
    expected = begun[max(begun)] if begun else None
    assert table.lookup(mode, num_tokens) == expected


def test_rows_are_kept_sorted():
    table = PlanTable(tuple(reversed(TABLE.rows)))
    assert table == TABLE
    assert [row.min_tokens for row in table.rows] == [64, 256, 64, 1024]


def test_a_row_may_move_the_cut_and_bound_what_it_costs():
    layer = LayerShape((GemmShape("g", n=128 * 132, k=8192),))
    batch = prefill(2048)  # eight rows of tiles, in 132 columns

    def plan(**row):
        table = PlanTable((PlanRow(Mode.PREFILL, 1, Kind.WEAVE, **row),))
        return plan_batch(batch, table, layer, 132)

    assert plan() == plan(max_extra_permille=0) == Plan(Kind.WEAVE, 1024)
    assert plan(cut_offset=256).cut == 1280
    assert [plan(cut_offset=offset).cut for offset in (-9999, 9999)] == [1, 2047]
    # A token more in one half than whole tiles hold: nine waves instead of eight.
    assert plan(cut_offset=1, max_extra_permille=125).kind is Kind.WEAVE
    lost = plan(cut_offset=1, max_extra_permille=124)
    assert lost == Plan(Kind.OFF, reason="the halves take 12.5 % more waves")


def test_where_cut():
    batch = prefill(3, 5, 2)
    found = [where_cut(batch, cut) for cut in range(1, 10)]
    assert [cut for cut, where in enumerate(found, 1) if where == "between"] == [3, 8]
    for cut in (-1, 0, 10, 11):
        with pytest.raises(ValueError, match=f"cut: got {cut}; expected 1 to 9"):
            where_cut(batch, cut)


def test_communication_takes_its_sms_from_the_gemms():
    # 132 tiles in a row: one wave on 132 SMs, two on 124, so the halves of three rows differ.
    layer = LayerShape((GemmShape("g", n=128 * 132, k=8192),))
    eight = PlanTable((PlanRow(Mode.PREFILL, 1, Kind.WEAVE, 8),))
    none = PlanTable((PlanRow(Mode.PREFILL, 1, Kind.WEAVE, 0),))
    for batch in map(prefill, range(700, 5000, 130)):
        for table, left in ((eight, 124), (none, 132)):
            assert plan_batch(batch, table, layer, 132).cut == best_cut(batch.lengths, layer, left)
    with pytest.raises(ValueError, match="num_sms: got 9; 8 CTAs leave too few"):
        plan_batch(prefill(5000), eight, layer, 9)
    with pytest.raises(ValueError, match="align: got 0"):
        plan_batch(prefill(5000), eight, layer, 132, align=0)


@pytest.mark.parametrize(
    ("mode", "lengths", "message"),
    [
        ("prefill", (1,), "mode: got 'prefill'; expected one of prefill, mixed, decode"),
        (Mode.PREFILL, (), r"lengths: got \(\); expected a tuple"),
        (Mode.PREFILL, [5], r"lengths: got \[5\]; expected a tuple"),
        (Mode.PREFILL, (5, 0), "lengths: got 0; expected positive integers"),
        (Mode.MIXED, (5, -3), "lengths: got -3"),
        (Mode.MIXED, (5, 2.0), r"lengths: got 2\.0"),
        (Mode.MIXED, (5, True), "lengths: got True"),
        (Mode.DECODE, (1, 2), "lengths: got 2; expected 1 token a decode request"),
    ],
)
def test_impossible_batches_are_refused(mode, lengths, message):
    with pytest.raises(ValueError, match=message):
        BatchShape(mode, lengths)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mode", "prefill", "mode: got 'prefill'; expected one of prefill, mixed"),
        ("kind", None, "kind: got None; expected one of off, fuse, weave"),
        ("min_tokens", 0, "min_tokens: got 0; expected an integer of at least"),
        ("min_tokens", 7.5, r"min_tokens: got 7\.5"),
        ("ctas", -1, "ctas: got -1; expected an integer of at least 0"),
        ("fuse_ctas", "8", "fuse_ctas: got '8'"),
        ("fuse_ctas", True, "fuse_ctas: got True"),
        ("cut_offset", 1.0, r"cut_offset: got 1\.0; expected an integer"),
        ("falls_back", 1, "falls_back: got 1; expected a bool"),
        ("max_extra_permille", -1, "max_extra_permille: got -1; expected an integer of at least"),
    ],
)
def test_rows_refuse_by_field(field, value, message):
    good = {"mode": Mode.PREFILL, "min_tokens": 9, "kind": Kind.WEAVE}
    with pytest.raises(ValueError, match=message):
        PlanRow(**{**good, field: value})


def test_two_rows_of_a_mode_that_start_at_one_size():
    row = PlanRow(Mode.PREFILL, 5, Kind.WEAVE)
    with pytest.raises(ValueError, match="two prefill rows, field min_tokens: both 5"):
        PlanTable((row, PlanRow(Mode.PREFILL, 5, Kind.OFF)))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("min_tokens", 0, "min_tokens: got 0; expected an integer of at least 1"),
        ("fuse_min_tokens", -1, "fuse_min_tokens: got -1; expected an integer of at least 0"),
        ("decode_min_tokens", -1, "decode_min_tokens: got -1"),
        ("ctas", -2, "ctas: got -2"),
        ("fuse_ctas", 1.0, r"fuse_ctas: got 1\.0"),
    ],
)
def test_thresholds_out_of_range(option, value, message):
    sizes = {"min_tokens": 9, "fuse_min_tokens": 1, "decode_min_tokens": 9}
    with pytest.raises(ValueError, match=message):
        PlanTable.from_thresholds(**{**sizes, "ctas": 1, "fuse_ctas": 1, option: value})


RANK = """
import random, sys
from sglang_tokenweave.plan import BatchShape, Mode, PlanTable, plan_batch
from sglang_tokenweave.waves import dense_layer, moe_layer
table = PlanTable.from_thresholds(
    min_tokens=64, fuse_min_tokens=16, decode_min_tokens=32, ctas=8, fuse_ctas=16
)
dense = dense_layer(8192, 64, 8, 128, 28672, 8)
layers = dense, moe_layer(dense, 16, 2)
draw = random.Random(5)
for _ in range(400):
    mode = draw.choice(list(Mode))
    top = 1 if mode is Mode.DECODE else 2000
    lengths = tuple(draw.randint(1, top) for _ in range(draw.randint(1, 90 if top == 1 else 6)))
    layer, align = draw.choice(layers), draw.choice((1, 8))
    print(plan_batch(BatchShape(mode, lengths), table, layer, 132, align=align))
print(table)
assert not {"torch", "sglang", "numpy"} & set(sys.modules), "the planner is pure"
"""


def test_two_processes_plan_alike():
    outputs = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", RANK]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    for kind in Kind:
        assert f"<Kind.{kind.name}:" in outputs[0], "the sample must contain every kind of plan"


GRAPHS = (GraphShape(1024, 512, 4), GraphShape(2048, 1024, 4), GraphShape(4096, 2048, 4))


def graph_plan(*lengths, graphs=GRAPHS, mode=Mode.PREFILL):
    batch = BatchShape(mode, lengths)
    return plan_batch(batch, WEAVE_ALL, LAYER, 132, graphs=graphs)


@pytest.mark.parametrize(
    ("num_tokens", "graph_tokens", "cut"),
    [(513, 1024, 512), (1024, 1024, 512), (1025, 2048, 1024), (4096, 4096, 2048)],
)
def test_the_smallest_graph_that_holds_a_batch_runs_it_at_its_own_cut(
    num_tokens, graph_tokens, cut
):
    assert graph_plan(num_tokens) == Plan(Kind.WEAVE, cut, 4, 12, graph_tokens=graph_tokens)


def test_what_no_graph_holds_is_left_to_stock_up_to_the_largest():
    assert graph_plan(512).kind is Kind.OFF  # nothing would be left for the second half
    assert graph_plan(*5 * [200]).reason == "more requests than a woven graph holds"
    assert graph_plan(*4 * [250]).graph_tokens == 1024
    smallest = (GraphShape(1024, 512, 4, least_tokens=897), *GRAPHS[1:])
    assert graph_plan(897, graphs=smallest).graph_tokens == 1024
    assert graph_plan(896, graphs=smallest) == Plan(
        Kind.OFF, reason="no woven graph of this size was captured"
    )


def test_batches_larger_than_every_graph_and_decodes_go_without():
    assert graph_plan(4097) == graph_plan(4097, graphs=())
    assert graph_plan(4097).graph_tokens == 0
    assert graph_plan(*600 * [1], mode=Mode.DECODE).graph_tokens == 0


@given(long_batches | small_batches, tables)
@settings(deadline=None)
def test_a_graph_changes_nothing_but_a_woven_plan(batch, table):
    plan = plan_batch(batch, table, LAYER, 132)
    chosen = plan_batch(batch, table, LAYER, 132, graphs=GRAPHS)
    if plan.kind is not Kind.WEAVE or batch.num_tokens > 4096:
        assert chosen == plan
    elif chosen.kind is Kind.WEAVE:
        assert chosen.cut < batch.num_tokens <= chosen.graph_tokens


@given(st.sampled_from(Mode), st.integers(1, 100), tables)
def test_an_unsplit_batch_is_never_woven(mode, num_tokens, table):
    plan = plan_unsplit(mode, num_tokens, table)
    row = table.lookup(mode, num_tokens, weave=False)
    fuses = row is not None and row.kind is Kind.FUSE
    assert plan.kind is (Kind.FUSE if fuses else Kind.OFF)
    assert plan.fuse_ctas == (row.fuse_ctas if fuses else 0)
