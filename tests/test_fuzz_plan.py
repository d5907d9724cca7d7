"""Arbitrary tables of plans, batches and cuts: documented errors only, and valid plans."""

import json

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sglang_tokenweave import plan as planner
from sglang_tokenweave.plan import BatchShape, Kind, Mode, Plan, PlanRow, PlanTable, plan_batch
from sglang_tokenweave.split import spans
from sglang_tokenweave.waves import GemmShape, LayerShape

fuzz = settings(deadline=None, derandomize=True, max_examples=300)
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def accepted(built, /, **strategies):
    """Build values from fields of which some are wrong; leave out what is refused by name."""

    def build(values):
        try:
            return built(**values)
        except ValueError as error:
            refusal = str(error)
        assert any(refusal.startswith(f"{name}: got ") for name in values)
        return None

    return st.fixed_dictionaries(strategies).map(build).filter(lambda value: value is not None)


rows = accepted(
    PlanRow,
    mode=st.sampled_from(Mode) | st.text(max_size=4),
    min_tokens=st.integers(-1, 200),
    kind=st.sampled_from(Kind) | st.none(),
    ctas=st.integers(-1, 140) | st.booleans(),
    fuse_ctas=st.integers(-1, 64),
)
tables = st.lists(rows, max_size=8, unique_by=lambda row: (row.mode, row.min_tokens)).map(
    lambda rows: PlanTable(tuple(rows))
)
batches = accepted(
    BatchShape,
    mode=st.sampled_from(Mode),
    lengths=st.lists(st.integers(0, 3000) | st.just(1), max_size=6).map(tuple)
    | st.integers(0, 300).map(lambda requests: (1,) * requests),
)
layers = st.lists(
    st.one_of(
        st.builds(GemmShape, st.just("dense"), st.integers(1, 30_000), st.integers(1, 30_000)),
        st.builds(
            GemmShape,
            st.just("experts"),
            st.integers(1, 9000),
            st.integers(1, 9000),
            st.integers(4, 64),
            st.integers(1, 4),
        ),
    ),
    max_size=4,
).map(lambda gemms: LayerShape(tuple(gemms)))


@given(batches, tables, layers, st.integers(-1, 160), st.integers(-1, 64))
@fuzz
def test_a_plan_is_valid_and_the_same_every_time(batch, table, layer, num_sms, align):
    arguments = (batch, table, layer, num_sms)
    try:
        plan = plan_batch(*arguments, align=align)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "num_sms" in refusal or "align" in refusal
        assert align < 1 or num_sms < 2 + max(row.ctas for row in table.rows)
        return
    planner._plan.cache_clear()  # so that the second one is another calculation
    assert plan_batch(*arguments, align=align) == plan
    if plan.kind is Kind.WEAVE:
        assert 0 < plan.cut < batch.num_tokens
        assert plan.cut % align == 0
        assert any(row.ctas == plan.ctas <= num_sms - 2 for row in table.rows)
    else:
        assert plan == Plan(plan.kind, fuse_ctas=plan.fuse_ctas, reason=plan.reason)


valid_row = {"mode": "prefill", "min_tokens": 1, "kind": "weave", "ctas": 8, "fuse_ctas": 16}
damaged_rows = st.tuples(st.sampled_from([*valid_row, "other"]), junk).map(
    lambda change: {**valid_row, change[0]: change[1]}
)
documents = st.one_of(
    st.text(max_size=30),
    junk.map(json.dumps),
    st.lists(damaged_rows | junk, max_size=3).map(lambda rows: json.dumps({"rows": rows})),
    tables.map(PlanTable.to_json),
    tables.map(lambda table: table.to_json()[:-3]),
)


@given(documents)
@example("[" * 5000)
@example('{"rows": [%s]}' % ("9" * 4301))
@fuzz
def test_a_text_is_a_table_or_a_clear_error(text):
    try:
        table = PlanTable.from_json(text)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert PlanTable.from_json(table.to_json()) == table
    assert not refusal or refusal.startswith(("rows:", "row ", "two "))


@given(st.lists(st.integers(0, 50), max_size=12).map(tuple), st.integers(-5, 700))
@fuzz
def test_a_batch_is_cut_at_any_token_and_nowhere_else(lengths, cut):
    if not 0 < cut < sum(lengths):
        with pytest.raises(ValueError, match=f"cut={cut} is not inside"):
            spans(lengths, cut)
        return
    halves = []
    for span in spans(lengths, cut):
        taken = list(lengths[span.requests])
        taken[0] -= span.skipped
        taken[-1] -= span.dropped
        assert sum(taken) == span.tokens.stop - span.tokens.start
        assert min(taken) >= 0
        halves.append(taken)
    assert [sum(half) for half in halves] == [cut, sum(lengths) - cut]
    assume(all(lengths))
    assert all(all(half) for half in halves), "a half has a request without a token"
