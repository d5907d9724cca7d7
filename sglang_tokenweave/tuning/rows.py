"""From the tuned table to the planner's: what is done at each size, measured or between two."""

from dataclasses import replace
from itertools import pairwise

from sglang_tokenweave.plan import Kind, Mode, PlanRow, PlanTable
from sglang_tokenweave.tuning.table import OFF, Bucket, Candidate, Key, Table
from sglang_tokenweave.waves import cut_beside, extra_permille

_ORDER = (Kind.OFF, Kind.FUSE, Kind.WEAVE)


def plan_table(table: Table) -> PlanTable:
    """Return the planner's table.

    At a measured size: what was chosen there. Below the smallest and above the largest: nothing.
    Between two: the one of the two choices that does less, as in the smaller bucket if they are of
    one kind; so nothing is woven that is not woven on both sides. A weave between two also has to
    keep what the sides gained: its cut may add no more waves than the worse of theirs does, plus
    the share of the time that the lesser of them gained. It is the planner's: how far the best cut
    of one size was from that tells nothing of another size. What is woven between two sizes and
    cannot be cut runs stock: that fusing won where it was measured tells nothing of larger sizes.
    """
    rows = []
    for mode in (Mode.PREFILL, Mode.DECODE):
        buckets = table.of_mode(mode)
        rows += [_row(mode, bucket.tokens, bucket.chosen) for bucket in buckets]
        rows += [_gap(table.key, *sides) for sides in pairwise(buckets) if _is_gap(*sides)]
        if buckets:
            rows.append(_row(mode, buckets[-1].tokens + 1, OFF))
    return PlanTable(tuple(rows))


def _row(mode: Mode, tokens: int, chosen: Candidate) -> PlanRow:
    return PlanRow(
        mode,
        tokens,
        chosen.kind,
        ctas=chosen.ctas,
        fuse_ctas=chosen.fuse_ctas,
        cut_offset=chosen.cut_offset,
    )


def _is_gap(below: Bucket, above: Bucket) -> bool:
    return above.tokens - below.tokens > 1


def _gap(key: Key, below: Bucket, above: Bucket) -> PlanRow:
    less = min(below, above, key=lambda bucket: _ORDER.index(bucket.chosen.kind))
    allowed = None
    if less.chosen.kind is Kind.WEAVE:
        sides = (below, above)
        gain = min(gain_permille(side) for side in sides)
        if gain > 0:  # else a person chose a loss, and knows why
            allowed = max(_extra(key, side) for side in sides) + gain
    row = _row(below.mode, below.tokens + 1, replace(less.chosen, cut_offset=0))
    return replace(row, max_extra_permille=allowed, falls_back=False)


def gain_permille(bucket: Bucket) -> int:
    """Return what the choice gained, in 1/1000 of OFF's time; negative if a person chose a loss."""
    off, chosen = bucket.time_of(OFF).us, bucket.time_of(bucket.chosen).us
    return int(1000 * (off - chosen) / off)


def _extra(key: Key, bucket: Bucket) -> int:
    sms = key.sms - bucket.chosen.ctas
    cut = cut_beside((bucket.tokens,), key.layer, sms, bucket.chosen.cut_offset)
    return extra_permille(key.layer, bucket.tokens, cut, sms)
