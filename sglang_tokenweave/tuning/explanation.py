"""Say which plan a batch would get from a tuned table, what the alternatives took, and why."""

from dataclasses import asdict, dataclass
from typing import Any

from sglang_tokenweave.plan import BatchShape, Kind, Plan, plan_batch
from sglang_tokenweave.tuning.rows import plan_table
from sglang_tokenweave.tuning.table import OFF, Bucket, Candidate, Key, Table, noise_us
from sglang_tokenweave.waves import cut_beside, predicted_us


@dataclass(frozen=True)
class Alternative:
    """One way to run the batch."""

    candidate: Candidate
    cut: int  # tokens of the first half here; 0 unless it weaves
    below_us: float | None  # measured at the next smaller size, or at this one
    above_us: float | None  # measured at the next larger size, or at this one
    predicted_us: float  # of the GEMMs of all layers, by the wave model; no attention, no sums


@dataclass(frozen=True)
class Explanation:
    """What happens to a batch, and why."""

    batch: BatchShape
    plan: Plan
    why: tuple[str, ...]  # sentences
    below: int | None  # tokens of the measured size at or below
    above: int | None
    alternatives: tuple[Alternative, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def explain(table: Table, batch: BatchShape) -> Explanation:
    """Explain the plan of a batch.

    Raises:
        ValueError: the table holds nothing of this mode.
    """
    buckets = table.of_mode(batch.mode)
    if not buckets:
        raise ValueError(f"the table holds no sizes of mode {batch.mode}")
    tokens = batch.num_tokens
    below = next((each for each in reversed(buckets) if each.tokens <= tokens), None)
    above = next((each for each in buckets if each.tokens >= tokens), None)
    plan = plan_batch(batch, plan_table(table), table.key.layer, table.key.sms)
    sides = [each for each in (below, above) if each is not None]
    candidates = dict.fromkeys(each.candidate for side in sides for each in side.measured)
    return Explanation(
        batch,
        plan,
        (*_where(tokens, below, above), *_why(plan, below, above)),
        below.tokens if below else None,
        above.tokens if above else None,
        tuple(
            Alternative(
                each,
                _cut(table.key, batch, each),
                _us(below, each),
                _us(above, each),
                round(_predict(table.key, batch, each), 1),
            )
            for each in candidates
            if each.kind is not Kind.WEAVE or tokens > 1
        ),
    )


def _where(tokens: int, below: Bucket | None, above: Bucket | None) -> list[str]:
    if below is None:
        return [f"{tokens} tokens are fewer than any measured size: such batches run stock."]
    if above is None:
        return [f"{tokens} tokens are more than any measured size: such batches run stock."]
    if below is above:
        return [f"{tokens} tokens were measured."]
    return [
        f"{tokens} tokens lie between {below.tokens}, where {below.chosen.kind} was chosen, and "
        f"{above.tokens}, where {above.chosen.kind} was: the one of the two that does less holds."
    ]


def _why(plan: Plan, below: Bucket | None, above: Bucket | None) -> list[str]:
    if below is None or above is None:
        return []
    sentences = [_verdict(side) for side in dict.fromkeys((below, above))]
    if plan.kind is Kind.OFF and Kind.OFF not in {below.chosen.kind, above.chosen.kind}:
        sentences.append(f"Not woven here: {plan.reason}, which would eat the gain.")
    return sentences


def _verdict(bucket: Bucket) -> str:
    off, chosen = bucket.time_of(OFF), bucket.time_of(bucket.chosen)
    at = f"At {bucket.tokens} tokens"
    by_hand = " This choice was made by hand." if bucket.is_edited else ""
    if bucket.chosen != OFF:
        gain = 100 * (off.us - chosen.us) / off.us
        return (
            f"{at} {bucket.chosen.kind} took {chosen.us:g} us and off {off.us:g} us: {gain:.1f} % "
            f"less.{by_hand}"
        )
    others = [each for each in bucket.measured if each.candidate != OFF]
    if not others:
        return f"{at} nothing but off was measured.{by_hand}"
    best = min(others, key=lambda each: each.us)
    return (
        f"{at} the best other one, {best.candidate.kind}, took {best.us:g} us and off {off.us:g} "
        f"us; to count it has to gain {noise_us(off, best):.1f} us.{by_hand}"
    )


def _us(bucket: Bucket | None, candidate: Candidate) -> float | None:
    found = [each.us for each in bucket.measured if each.candidate == candidate] if bucket else []
    return found[0] if found else None


def _cut(key: Key, batch: BatchShape, candidate: Candidate) -> int:
    if candidate.kind is not Kind.WEAVE or batch.num_tokens < 2:
        return 0
    sms = key.sms - candidate.ctas
    return cut_beside(batch.lengths, key.layer, sms, candidate.cut_offset)


def _predict(key: Key, batch: BatchShape, candidate: Candidate) -> float:
    cut = _cut(key, batch, candidate)
    parts = (cut, batch.num_tokens - cut) if cut else (batch.num_tokens,)
    sms = key.sms - candidate.ctas
    layer = sum(predicted_us(gemm, part, sms) for part in parts for gemm in key.layer.gemms)
    return key.layers * layer
