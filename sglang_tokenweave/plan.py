"""Decide for each batch whether to weave it, fuse it or leave it alone, and where to cut it.

A pure function of integers that every rank knows: a rank that decided otherwise would deadlock the
others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, Self

from sglang_tokenweave.waves import LayerShape, cut_beside, extra_permille


class Mode(StrEnum):
    """What the requests of a batch do."""

    PREFILL = "prefill"
    MIXED = "mixed"  # some prefill, some decode
    DECODE = "decode"  # one token each


class Kind(StrEnum):
    """What the extension does with a batch."""

    OFF = "off"  # nothing: stock SGLang
    FUSE = "fuse"  # the fused op, on the whole batch
    WEAVE = "weave"  # the fused op of one half beside the computation of the other


# Staging takes three times the rows of all ranks, and with more than two ranks larger batches take
# longer by one exchange of everything than by two of shares.
MOST_ONE_SHOT_TOKENS = 512
# Of an op alone that goes by two exchanges of shares, where the transport has that: more gain
# little.
MOST_TWO_SHOT_TOKENS = 1024


@dataclass(frozen=True)
class Plan:
    """What is done with one batch."""

    kind: Kind
    cut: int = 0  # tokens in the first half; 0 unless WEAVE
    ctas: int = 0  # of the communication op beside a computation; 0: copy engines
    # Of an op that has the stream to itself: FUSE, and a WEAVE's last one. FUSE with 0: one-shot.
    fuse_ctas: int = 0
    reason: str = ""  # why less is done than weaving
    graph_tokens: int = 0  # of the CUDA graph that runs it; 0: launch by launch

    @property
    def is_one_shot(self) -> bool:
        """Whether ranks exchange all rows at once, and each keeps the whole residual."""
        return self.kind is Kind.FUSE and self.fuse_ctas == 0


class GraphShape(NamedTuple):
    """What a CUDA graph of the woven forward can run."""

    num_tokens: int  # at most
    cut: int  # at least one token more
    num_requests: int  # at most
    least_tokens: int = 1  # below, stock has a graph that pads less, and we have none


@dataclass(frozen=True)
class BatchShape:
    """All the planner sees of a batch.

    Raises:
        ValueError: a length is not a positive integer, or not 1 in a decode batch.
    """

    mode: Mode
    lengths: tuple[int, ...]  # new tokens of each request, in batch order

    def __post_init__(self) -> None:
        _check_member("mode", self.mode, Mode)
        if type(self.lengths) is not tuple or not self.lengths:
            raise ValueError(f"lengths: got {self.lengths!r}; expected a tuple, not empty")
        # Whole-tuple operations: this runs in every step, with hundreds of requests.
        if set(map(type, self.lengths)) != {int} or min(self.lengths) < 1:
            wrong = next(n for n in self.lengths if type(n) is not int or n < 1)
            raise ValueError(f"lengths: got {wrong!r}; expected positive integers")
        if self.mode is Mode.DECODE and max(self.lengths) > 1:
            raise ValueError(f"lengths: got {max(self.lengths)}; expected 1 token a decode request")

    @property
    def num_tokens(self) -> int:
        """Return the new tokens of the whole batch."""
        return sum(self.lengths)


@dataclass(frozen=True)
class PlanRow:
    """What is best from `min_tokens` on, up to the next row of the same mode.

    Raises:
        ValueError: naming the field, what came and what is allowed.
    """

    mode: Mode
    min_tokens: int
    kind: Kind
    ctas: int = 0  # as of Plan
    fuse_ctas: int = 0
    cut_offset: int = 0  # tokens added to the cut that the waves of the layer ask for
    max_extra_permille: int | None = None  # of the whole's waves that a cut may add; None: any
    falls_back: bool = True  # of a WEAVE: what cannot be cut runs as the rows below it have it

    def __post_init__(self) -> None:
        _check_member("mode", self.mode, Mode)
        _check_count("min_tokens", self.min_tokens, least=1)
        _check_member("kind", self.kind, Kind)
        _check_count("ctas", self.ctas, least=0)
        _check_count("fuse_ctas", self.fuse_ctas, least=0)
        if type(self.falls_back) is not bool:
            raise ValueError(f"falls_back: got {self.falls_back!r}; expected a bool")
        if type(self.cut_offset) is not int:
            raise ValueError(f"cut_offset: got {self.cut_offset!r}; expected an integer")
        if self.max_extra_permille is not None:
            _check_count("max_extra_permille", self.max_extra_permille, least=0)


@dataclass(frozen=True)
class PlanTable:
    """What is best for batches of each mode and size: set by an operator, or measured.

    Raises:
        ValueError: two rows of a mode start at the same size.
    """

    rows: tuple[PlanRow, ...]  # given in any order, kept by mode and min_tokens

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=_order)))
        for before, row in pairwise(self.rows):
            if _order(row) == _order(before):
                raise ValueError(f"two {row.mode} rows, field min_tokens: both {row.min_tokens}")

    @property
    def needs_copy_engines(self) -> bool:
        """Whether a batch may be woven without CTAs."""
        return any(row.kind is Kind.WEAVE and row.ctas == 0 for row in self.rows)

    @property
    def needs_one_shot(self) -> bool:
        """Whether a batch may be fused without CTAs of its own."""
        return any(row.kind is Kind.FUSE and row.fuse_ctas == 0 for row in self.rows)

    def lookup(self, mode: Mode, num_tokens: int, *, weave: bool = True) -> PlanRow | None:
        """Return the last row of `mode` with `min_tokens` of at most `num_tokens`.

        A mixed batch uses the rows of prefill, unless the table has rows for mixed batches.
        Without `weave`, rows that weave are passed over if they fall back.
        """
        if mode == Mode.MIXED and all(row.mode != Mode.MIXED for row in self.rows):
            mode = Mode.PREFILL
        for row in reversed(self.rows):
            fits = row.mode == mode and row.min_tokens <= num_tokens
            if fits and (weave or row.kind is not Kind.WEAVE or not row.falls_back):
                return row
        return None

    @classmethod
    def from_thresholds(
        cls,
        *,
        min_tokens: int,
        fuse_min_tokens: int,
        decode_min_tokens: int,
        ctas: int,
        fuse_ctas: int,
    ) -> Self:
        """Build the table of an operator who names sizes, in tokens, and CTAs.

        Args:
            min_tokens: weave prefill from here on.
            fuse_min_tokens: fuse from here on batches that are too small to weave; 0: never.
            decode_min_tokens: weave decode from here on; 0: never.
            ctas: of the op beside a computation; 0: copy engines.
            fuse_ctas: of the op alone on its stream.
        """
        _check_count("min_tokens", min_tokens, least=1)
        _check_count("fuse_min_tokens", fuse_min_tokens, least=0)
        _check_count("decode_min_tokens", decode_min_tokens, least=0)
        rows = []
        for mode, weave_from in ((Mode.PREFILL, min_tokens), (Mode.DECODE, decode_min_tokens)):
            if weave_from:
                rows.append(PlanRow(mode, weave_from, Kind.WEAVE, ctas, fuse_ctas))
            if fuse_min_tokens and (not weave_from or fuse_min_tokens < weave_from):
                rows.append(PlanRow(mode, fuse_min_tokens, Kind.FUSE, fuse_ctas=fuse_ctas))
        return cls(tuple(rows))


def plan_batch(
    batch: BatchShape,
    table: PlanTable,
    layer: LayerShape,
    num_sms: int,
    *,
    align: int = 1,
    graphs: Sequence[GraphShape] = (),
) -> Plan:
    """Plan one batch: the table says what, the waves of the layer say where to cut.

    A woven prefill is run by the smallest CUDA graph that holds it, at that one's cut. Where there
    are graphs, launches one by one are too slow for sizes up to theirs: a batch that no graph holds
    is left to stock, whose own graphs hold it. Larger ones launch one by one, as stock does.

    Args:
        batch: the batch.
        table: what is best at each size.
        layer: the GEMMs of one layer on one rank.
        num_sms: SMs of the GPU; those of the communication are taken off here.
        align: the cut is a multiple of it, where no graph settles it.
        graphs: what was captured, in order of size; empty: nothing was.

    Raises:
        ValueError: the row's CTAs leave no SMs to the GEMMs.
    """
    return _plan(batch, table, layer, num_sms, align, tuple(graphs))


def plan_unsplit(mode: Mode, num_tokens: int, table: PlanTable) -> Plan:
    """Plan a batch that cannot be cut: it is fused or left alone."""
    row = table.lookup(mode, num_tokens, weave=False)
    if row is not None and _is_fused(row, num_tokens):
        return Plan(Kind.FUSE, fuse_ctas=row.fuse_ctas)
    return Plan(Kind.OFF, reason=_why_off(row, mode))


def where_cut(batch: BatchShape, cut: int) -> Literal["inside", "between"]:
    """Say whether a cut falls inside a request or between two.

    Raises:
        ValueError: the cut is not strictly inside the batch.
    """
    if not 0 < cut < batch.num_tokens:
        raise ValueError(f"cut: got {cut}; expected 1 to {batch.num_tokens - 1}")
    return "between" if cut in accumulate(batch.lengths) else "inside"


# Asked for several times in a step; most batches never come again, and repeated ones are decodes.
@lru_cache(maxsize=128)
def _plan(
    batch: BatchShape,
    table: PlanTable,
    layer: LayerShape,
    num_sms: int,
    align: int,
    graphs: tuple[GraphShape, ...],
) -> Plan:
    _check_count("align", align, least=1)
    row = table.lookup(batch.mode, batch.num_tokens)
    reason = ""
    if row is not None and row.kind is Kind.WEAVE:
        if graphs and batch.mode is not Mode.DECODE and batch.num_tokens <= graphs[-1].num_tokens:
            return _weave_in_graph(batch, row, layer, num_sms, graphs)
        if batch.num_tokens > align:  # then a multiple of it lies inside; align=1: two tokens
            return _weave(batch, row, layer, num_sms, align)
        reason = f"too few tokens to cut at a multiple of {align}"
        row = table.lookup(batch.mode, batch.num_tokens, weave=False)
    if row is not None and _is_fused(row, batch.num_tokens):
        return Plan(Kind.FUSE, fuse_ctas=row.fuse_ctas, reason=reason)
    return Plan(Kind.OFF, reason=reason or _why_off(row, batch.mode))


def _is_fused(row: PlanRow, num_tokens: int) -> bool:
    fits = row.fuse_ctas > 0 or num_tokens <= MOST_ONE_SHOT_TOKENS
    return row.kind is Kind.FUSE and fits


def _why_off(row: PlanRow | None, mode: Mode) -> str:
    if row is not None and row.kind is Kind.FUSE:
        return f"more than the {MOST_ONE_SHOT_TOKENS} tokens of a one-shot op"
    if row is not None and row.kind is Kind.WEAVE:
        return "woven in the table, and nothing was measured to be faster uncut"
    return "off in the table" if row else f"smaller than any {mode} row of the table"


def _weave(batch: BatchShape, row: PlanRow, layer: LayerShape, num_sms: int, align: int) -> Plan:
    sms = _sms_of_gemms(row, num_sms)
    cut = cut_beside(batch.lengths, layer, sms, row.cut_offset, align)
    return _unless_too_many_waves(
        Plan(Kind.WEAVE, cut, row.ctas, row.fuse_ctas), row, layer, batch.num_tokens, sms
    )


def _weave_in_graph(
    batch: BatchShape,
    row: PlanRow,
    layer: LayerShape,
    num_sms: int,
    graphs: tuple[GraphShape, ...],
) -> Plan:
    """Weave as captured: to look for a cut of its own would take up to a millisecond."""
    graph = next(graph for graph in graphs if batch.num_tokens <= graph.num_tokens)
    if batch.num_tokens < graph.least_tokens:
        return Plan(Kind.OFF, reason="no woven graph of this size was captured")
    if batch.num_tokens <= graph.cut:
        return Plan(Kind.OFF, reason="too few tokens for the second half of a woven graph")
    if len(batch.lengths) > graph.num_requests:
        return Plan(Kind.OFF, reason="more requests than a woven graph holds")
    plan = Plan(Kind.WEAVE, graph.cut, row.ctas, row.fuse_ctas, graph_tokens=graph.num_tokens)
    sms = _sms_of_gemms(row, num_sms)
    return _unless_too_many_waves(plan, row, layer, graph.num_tokens, sms)


def _sms_of_gemms(row: PlanRow, num_sms: int) -> int:
    sms = num_sms - row.ctas
    if sms < 2:
        raise ValueError(f"num_sms: got {num_sms}; {row.ctas} CTAs leave too few of them to GEMMs")
    return sms


def _unless_too_many_waves(
    plan: Plan, row: PlanRow, layer: LayerShape, num_tokens: int, sms: int
) -> Plan:
    if row.max_extra_permille is None:
        return plan
    extra = extra_permille(layer, num_tokens, plan.cut, sms)
    if extra <= row.max_extra_permille:
        return plan
    return Plan(Kind.OFF, reason=f"the halves take {extra / 10:g} % more waves")


def _order(row: PlanRow) -> tuple[str, int]:
    return row.mode.value, row.min_tokens


def _check_member(name: str, value: Any, members: type[StrEnum]) -> None:
    if type(value) is not members:
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(members)}")


def _check_count(name: str, value: Any, *, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name}: got {value!r}; expected an integer of at least {least}")
