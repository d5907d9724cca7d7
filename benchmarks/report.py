"""Make tables and plots again from results, without a GPU: python -m benchmarks.report --help."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import bars, prefill_bars, serving_table, table
from benchmarks.bars import Verdict
from benchmarks.schema import Result, SchemaError, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tables, write plots, judge bars; return 0, 1 if a bar is missed, or 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--plots", type=Path, help="folder to write the plots to")
    parser.add_argument("--check", action="store_true", help="judge the bars")
    options = parser.parse_args(arguments)
    try:
        judged = [_report(path, options.plots, check=options.check) for path in options.files]
    except (SchemaError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(judged) else 1


def _report(path: Path, plots: Path | None, *, check: bool) -> bool:
    result = load(path)
    print(table.text(result), end="\n\n")
    if plots is not None:
        from benchmarks.plot import plot  # matplotlib: not needed for the rest

        for written in plot(result, plots, path.stem):
            print(f"wrote {written}")
    return _check(result) if check else True


def _check(result: Result) -> bool:
    judges = {"prefill": prefill_bars, "decode": prefill_bars, "serving": serving_table}
    judged = judges.get(result.bench, bars).judge(result)
    cells = [(each.bar, str(each.tokens), each.verdict.value, each.numbers) for each in judged]
    print("\n".join(table.markdown(("bar", "tokens", "verdict", "numbers"), cells)))
    passed = sum(each.verdict is Verdict.PASS for each in judged)
    print(f"\n{passed} of {len(judged)} passed")
    return passed == len(judged)


if __name__ == "__main__":
    sys.exit(main())
