"""The bars that prefills and decodes of whole models must clear, judged on a file of results."""

import re

from benchmarks.bars import Judged, Verdict
from benchmarks.prefill_table import BOUND, Rows, ours, stock
from benchmarks.roles import by_size, shapes
from benchmarks.schema import Result

# The fastest stock over ours, at least, by tokens of a prefill; on two H200, and on four (the
# paper's figure). However many layers there are: of few, the first and the last weigh more.
SPEED_UPS = {
    "tp8rank-tp2": {1024: 1.20, 2048: 1.25, 4096: 1.28, 8192: 1.30},
    "llama-3-8b-tp2": {1024: 1.05, 2048: 1.08, 4096: 1.15, 8192: 1.13},
    "llama-3.3-70b-tp2": {1024: 1.08, 2048: 1.09, 4096: 1.10, 8192: 1.10},
    "llama-3.3-70b-tp4": {8192: 1.13},
}
# Ours over the same model without communication, at most.
BOUNDS = {"tp8rank-tp2": {2048: 1.05, 8192: 1.00}}
CPU = 2.2  # times stock's at most, per layer
NOISE = 1.015  # the planner's choice over stock as it comes, at most, anywhere


def judge(result: Result) -> list[Judged]:
    """Hold a result against every bar of its shapes.

    Raises:
        ValueError: it is a smoke test.
    """
    if result.meta.smoke:
        raise ValueError("a smoke test's times mean nothing: no bar is judged on them")
    return [
        judged
        for shape in shapes(result)
        for tokens, rows in by_size(result, shape).items()
        for judged in _size(result.bench, shape, tokens, rows)
    ]


def _size(bench: str, shape: str, tokens: int, rows: Rows) -> list[Judged]:
    """Return what there is to judge at one size."""
    model = re.sub(r"-\d+l-", "-", shape) if bench == "prefill" else ""
    best, mine, bound = stock(rows), ours(rows), rows.get(BOUND)
    if best is None or mine is None:
        return [Judged(f"{shape}: ours and stock", tokens, Verdict.MISSING, "")]
    found = []

    def add(bar: str, ratio: float, kept: bool, limit: str) -> None:
        verdict = Verdict.PASS if kept else Verdict.FAIL
        found.append(Judged(f"{shape}: {bar}", tokens, verdict, f"{ratio:.3f}, {limit}"))

    least = SPEED_UPS.get(model, {}).get(tokens)
    if least is not None:
        ratio = best.time_us / mine.time_us
        add(f"{best.variant} / {mine.variant}", ratio, ratio >= least, f"at least {least:.2f}")
    most = BOUNDS.get(model, {}).get(tokens)
    if most is not None and bound is not None:
        ratio = mine.time_us / bound.time_us
        add(f"{mine.variant} / {BOUND}", ratio, ratio <= most, f"at most {most:.2f}")
    cpu = [row.extra.get("cpu_us_per_layer") for row in (mine, best)]
    if cpu[0] and cpu[1]:
        ratio = cpu[0] / cpu[1]
        add(f"CPU of {mine.variant} / {best.variant}", ratio, ratio <= CPU, f"at most {CPU}")
    if mine.variant == "auto" and "stock/default" in rows:
        ratio = mine.time_us / rows["stock/default"].time_us
        add("auto / stock/default", ratio, ratio <= NOISE, f"at most {NOISE}")
    return found
