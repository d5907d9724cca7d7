"""`python -m sglang_tokenweave.explain --table FILE --tokens 700,300`: what would run, and why."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sglang_tokenweave.plan import BatchShape, Mode, Plan
from sglang_tokenweave.tuning import text
from sglang_tokenweave.tuning.explanation import Alternative, Explanation, explain
from sglang_tokenweave.tuning.table import Candidate


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m sglang_tokenweave.explain",
        description="Tell which plan a batch would get from a tuned table, and why.",
        epilog="exit code: 0, or 2 for bad arguments or a bad table",
    )
    found.add_argument("--table", required=True, type=Path, metavar="FILE")
    found.add_argument(
        "--tokens",
        required=True,
        metavar="N,N,...",
        help="new tokens of each request; for decode one number: how many requests",
    )
    found.add_argument("--mode", choices=[*Mode], default=Mode.PREFILL.value)
    found.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return found


def main(arguments: Sequence[str]) -> int:
    """Explain, and return the exit code."""
    options = parser().parse_args(arguments)
    try:
        table, _ = text.read_file(options.table)
        found = explain(table, _batch(Mode(options.mode), options.tokens))
    except ValueError as error:
        sys.stderr.write(f"{parser().prog}: error: {error}\n")
        return 2
    shown = json.dumps(found.as_dict(), indent=1) if options.json else "\n".join(lines(found))
    sys.stdout.write(shown + "\n")
    return 0


def _batch(mode: Mode, tokens: str) -> BatchShape:
    try:
        lengths = tuple(int(word) for word in tokens.split(","))
    except ValueError:
        raise ValueError(f"--tokens is {tokens!r}; expected numbers such as 700,300") from None
    if mode is Mode.DECODE and len(lengths) == 1 and 0 < lengths[0] <= 1 << 20:
        lengths = (1,) * lengths[0]
    return BatchShape(mode, lengths)


def lines(found: Explanation) -> Iterator[str]:
    """Yield the explanation for people."""
    tokens, requests = found.batch.num_tokens, len(found.batch.lengths)
    yield f"{found.batch.mode}, {tokens} tokens of {requests} requests: {_summary(found.plan)}"
    yield from found.why
    yield ""
    measured = [_column(found.below), _column(found.above)]
    rows = [("plan", *measured, "predicted GEMMs, us")]
    rows += [_row(each) for each in found.alternatives]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join(cells)


def _summary(plan: Plan) -> str:
    words = [f"cut after {plan.cut}" if plan.cut else ""]
    if plan.cut:
        words += [f"{plan.ctas} CTAs beside" if plan.ctas else "copy engines beside"]
    words += [f"{plan.fuse_ctas} CTAs alone" if plan.fuse_ctas else ""]
    words += ["one-shot" if plan.is_one_shot else ""]
    shown = ", ".join(word for word in words if word)
    return f"{plan.kind} ({shown})" if shown else str(plan.kind)


def _row(each: Alternative) -> tuple[str, str, str, str]:
    return (
        _name(each.candidate, each.cut),
        _us(each.below_us),
        _us(each.above_us),
        _us(each.predicted_us),
    )


def _name(candidate: Candidate, cut: int) -> str:
    return _summary(Plan(candidate.kind, cut, candidate.ctas, candidate.fuse_ctas))


def _column(tokens: int | None) -> str:
    return "-" if tokens is None else f"measured at {tokens}, us"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
