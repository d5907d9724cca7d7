"""The bars that the op must clear, judged on a file of results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from benchmarks.roles import Role, by_size, fastest
from benchmarks.schema import Result, Row

SHAPE = "h8192-bf16"  # the bars are set for this shape, on two H200

Rows = Mapping[str, Row]
Find = Callable[[Rows], Row | None]
Judge = Callable[[Rows], tuple[bool, str] | None]  # None: a row it needs is missing


class Verdict(Enum):
    """What came of a bar at one size."""

    PASS = "pass"
    FAIL = "FAIL"
    MISSING = "not measured"


@dataclass(frozen=True)
class Judged:
    """One bar at one size."""

    bar: str
    tokens: int
    verdict: Verdict
    numbers: str  # what was compared


@dataclass(frozen=True)
class Bar:
    """A claim about sizes from `low` to `high` tokens."""

    text: str
    low: int
    high: float
    judge: Judge


def judge(result: Result) -> list[Judged]:
    """Hold a result against every bar.

    Raises:
        ValueError: it is a smoke test, or of another benchmark.
    """
    if result.bench != "op":
        raise ValueError(f"the bars are for the benchmark 'op', not {result.bench!r}")
    if result.meta.smoke:
        raise ValueError("a smoke test's times mean nothing: no bar is judged on them")
    sizes = by_size(result, SHAPE)
    return [each for bar in BARS for each in _judge(bar, sizes)]


def _judge(bar: Bar, sizes: Mapping[int, Rows]) -> list[Judged]:
    judged = []
    for tokens, rows in sizes.items():
        if bar.low <= tokens <= bar.high:
            found = bar.judge(rows)
            if found is None:
                judged.append(Judged(bar.text, tokens, Verdict.MISSING, ""))
            else:
                verdict = Verdict.PASS if found[0] else Verdict.FAIL
                judged.append(Judged(bar.text, tokens, verdict, found[1]))
    return judged or [Judged(bar.text, bar.low, Verdict.MISSING, "no such size")]


def _ratio(find: Find, other: Find, most: float) -> Judge:
    """Judge by the time of one row over that of another; at most 1 means truly faster."""

    def judge(rows: Rows) -> tuple[bool, str] | None:
        ours, theirs = find(rows), other(rows)
        if ours is None or theirs is None:
            return None
        ratio = ours.time_us / theirs.time_us
        good = ratio < 1 if most == 1 else ratio <= most
        return good, f"{_text(ours)} / {_text(theirs)} = {ratio:.3f}, {_limit(most)}"

    return judge


def _at_most(find: Find, most_us: float) -> Judge:
    def judge(rows: Rows) -> tuple[bool, str] | None:
        ours = find(rows)
        if ours is None:
            return None
        return ours.time_us <= most_us, f"{_text(ours)} us, at most {most_us:.0f} us"

    return judge


def _limit(most: float) -> str:
    return "below 1" if most == 1 else f"at most {most:.2f}"


def _text(row: Row) -> str:
    return f"{row.time_us:.1f} ({row.variant})"


def _fused(rows: Rows) -> Row | None:
    kernels = [row for row in rows.values() if row.variant.startswith("fused/")]
    return fastest(kernels, Role.OURS, most_ctas=32)


def _ours(rows: Rows) -> Row | None:
    return fastest(rows.values(), Role.OURS)


def _rival(rows: Rows) -> Row | None:
    return fastest(rows.values(), Role.RIVAL)


def _named(variant: str) -> Find:
    return lambda rows: rows.get(variant)


_MANY = float("inf")
_FLOOR, _TWO_SHOT = _named("floor"), _named("two_shot")
BARS = (
    Bar("up to 32 CTAs, of the floor", 1024, _MANY, _ratio(_fused, _FLOOR, 1.10)),
    Bar("up to 32 CTAs, of two-shot without norm", 1024, _MANY, _ratio(_fused, _TWO_SHOT, 1)),
    Bar("16 CTAs, of the floor", 1024, _MANY, _ratio(_named("fused/16"), _FLOOR, 1.15)),
    Bar("8 CTAs, of the floor", 1024, _MANY, _ratio(_named("fused/8"), _FLOOR, 1.6)),
    Bar("4 CTAs, of the floor", 1024, _MANY, _ratio(_named("fused/4"), _FLOOR, 3.0)),
    Bar("medium batches, of the fastest rival", 64, 512, _ratio(_ours, _rival, 1)),
    Bar("256 tokens", 256, 256, _at_most(_ours, 20)),
    Bar("small batches, of the fastest rival", 1, 32, _ratio(_ours, _rival, 1.05)),
    Bar("copy engines, of the floor", 2048, _MANY, _ratio(_named("copy_engine"), _FLOOR, 1.25)),
)
