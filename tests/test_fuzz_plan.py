"""Arbitrary tables of plans, batches and cuts: documented errors only, and valid plans."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sglang_tokenweave import plan as planner
from sglang_tokenweave.plan import BatchShape, Kind, Mode, Plan, PlanRow, PlanTable, plan_batch
from sglang_tokenweave.split import spans
from sglang_tokenweave.waves import GemmShape, LayerShape

fuzz = settings(deadline=None, derandomize=True, max_examples=300)


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
    cut_offset=st.integers(-300, 300),
    max_extra_permille=st.none() | st.integers(-1, 300),
    falls_back=st.booleans(),
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
