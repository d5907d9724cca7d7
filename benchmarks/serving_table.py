"""The table and the bars of whole servers under load: throughput and latency beside stock's."""

import re
from collections.abc import Mapping, Sequence

from benchmarks.bars import Judged, Verdict
from benchmarks.roles import shapes
from benchmarks.schema import Result, Row

OURS = "tokenweave"
NO_COMM = "no_comm"  # stock without sums over the ranks: a bound, and no rival
# Tokens a second over those of the fastest stock server, at least, by model; all requests at once,
# in chunks of the size that SGLang chooses.
SPEED_UPS = {"tp8rank": 1.19, "llama-3-8b": 1.06}
NOISE = 1.015  # by which our median time to the first token may exceed stock's

_HEAD = ("load", "server", "tokens/s", "over the fastest stock", "TTFT ms", "TPOT ms", "good/s")


def cells(result: Result) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return the head and the rows of the table."""
    found: list[Sequence[str]] = []
    for shape in shapes(result):
        rows = _rows(result, shape)
        best = fastest_stock(rows)
        for name, row in rows.items():
            rate = row.extra.get("tokens_per_s")
            found.append(
                [
                    shape,
                    name,
                    _shown(rate, ".0f"),
                    f"{rate / best.extra['tokens_per_s']:.2f}x" if best and rate else "-",
                    _shown(row.extra.get("ttft_us"), ".1f", 1e3),
                    _shown(row.extra.get("tpot_us"), ".2f", 1e3),
                    _shown(row.extra.get("goodput_requests_per_s"), ".2f"),
                ]
            )
    return _HEAD, found


def _shown(value: float | None, digits: str, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:{digits}}"


def fastest_stock(rows: Mapping[str, Row]) -> Row | None:
    """Return the stock server of the most tokens a second."""
    found = (row for row in stock(rows) if "tokens_per_s" in row.extra)
    return max(found, key=lambda row: row.extra["tokens_per_s"], default=None)


def stock(rows: Mapping[str, Row]) -> list[Row]:
    """Return the rows of stock servers."""
    return [row for name, row in rows.items() if name not in (OURS, NO_COMM)]


def judge(result: Result) -> list[Judged]:
    """Hold a result against the bars.

    Raises:
        ValueError: it is a smoke test.
    """
    if result.meta.smoke:
        raise ValueError("a smoke test's times mean nothing: no bar is judged on them")
    return [each for shape in shapes(result) for each in _load(shape, _rows(result, shape))]


def _load(shape: str, rows: Mapping[str, Row]) -> list[Judged]:
    best, ours = fastest_stock(rows), rows.get(OURS)
    if best is None or ours is None:
        return [Judged(f"{shape}: ours and stock", 0, Verdict.MISSING, "")]
    found = []

    def add(bar: str, ratio: float, kept: bool, limit: str) -> None:
        verdict = Verdict.PASS if kept else Verdict.FAIL
        found.append(Judged(f"{shape}: {bar}", ours.tokens, verdict, f"{ratio:.3f}, {limit}"))

    model = re.split(r"-\d+l-", shape)[0]
    ratio = ours.extra["tokens_per_s"] / best.extra["tokens_per_s"]
    if model in SPEED_UPS and shape.endswith("all_at_once") and "-chunk" not in shape:
        least = SPEED_UPS[model]
        add(f"tokens/s over {best.variant}", ratio, ratio >= least, f"at least {least:.2f}")
    else:
        add(f"tokens/s over {best.variant}", ratio, ratio >= 1 / NOISE, f"at least {1 / NOISE:.3f}")
    slower = max(ours.extra["ttft_us"] / row.extra["ttft_us"] for row in stock(rows))
    add("TTFT over the least of stock's", slower, slower <= NOISE, f"at most {NOISE}")
    return found


def _rows(result: Result, shape: str) -> dict[str, Row]:
    return {row.variant: row for row in result.rows if row.shape == shape}
