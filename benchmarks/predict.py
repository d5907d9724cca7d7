"""Predict times on GPUs that were not measured, and state the model's error where some were.

python -m benchmarks.predict; needs no GPU. docs/predictions.md is made of it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import checks, model, published
from benchmarks.checks import Check, Error
from benchmarks.model import B200, GB200, H100, LLAMA_70B, Gpu, Setting, Times
from benchmarks.table import markdown

PLACES: tuple[tuple[str, Gpu, tuple[int, ...]], ...] = (
    ("8 x H100", H100, (4, 8)),
    ("8 x B200", B200, (4, 8)),
    ("NVL72", GB200, (4, 8, 16)),
)
TOKENS = (1024, 4096, 16384)
MODEL = LLAMA_70B
_TRANSPORT = {False: "unicast", True: "multicast"}


@dataclass(frozen=True)
class Prediction:
    """A layer's times in a setting: on paper."""

    place: str
    ranks: int
    transport: str
    tokens: int
    times: Times


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the predictions and the errors; return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="predicted over measured")
    options = parser.parse_args(arguments)
    for name, text in parts().items():
        print(f"\n## {name}\n\n{text}")
    if options.json is not None:
        options.json.write_text(json.dumps(numbers(), indent=1) + "\n")
    if options.plot is not None:
        from benchmarks.predict_plot import plot  # matplotlib: not needed for the rest

        plot(checks.prefill(), checks.own(), options.plot)
    return 0


def parts() -> dict[str, str]:
    """Return the generated parts of docs/predictions.md by name."""
    found = {name: errors() for name, errors in _ERRORS.items()}
    return {
        "constants": _constants(),
        **{name: _error_table(errors) for name, errors in found.items()},
        "prefill": _prefill_table(),
        "predictions": _prediction_table(predictions()),
    }


def predictions() -> list[Prediction]:
    """Return all predictions."""
    return [
        Prediction(
            place,
            ranks,
            _TRANSPORT[multicast],
            tokens,
            model.layer_times(Setting(MODEL, gpu, ranks, multicast), tokens),
        )
        for place, gpu, sizes in PLACES
        for ranks in sizes
        for multicast in (False, True)
        for tokens in TOKENS
    ]


def numbers() -> dict[str, Any]:
    """Return predictions and checks for a program to read."""
    compared = [*checks.prefill(), *checks.ops(), *checks.own()]
    return {
        "predictions_us_per_layer": [asdict(each) for each in predictions()],
        "checks": [asdict(each) for each in compared],
    }


_ERRORS = {
    "errors-own": lambda: checks.errors(checks.own()),
    "errors-ops": lambda: checks.errors(checks.ops()),
    "errors-prefill": lambda: checks.errors(checks.prefill()),
}


def _constants() -> str:
    cells = [
        [
            gpu.name,
            str(gpu.num_sms),
            f"{gpu.peak_tflops:g}",
            f"{gpu.memory_gb_s / 1000:g}",
            f"{gpu.unicast_gb_s:g}",
            f"{gpu.multicast_gb_s:g}",
        ]
        for gpu in (model.H200, H100, B200, GB200)
    ]
    head = ("GPU", "SMs", "bf16 TFLOP/s", "memory TB/s", "unicast GB/s", "multicast GB/s")
    return "\n".join(markdown(head, cells))


def _error_table(errors: Sequence[Error]) -> str:
    cells = [
        [
            each.what,
            str(each.points),
            f"{100 * each.median:.0f} %",
            f"{100 * each.bias:+.0f} %",
            f"{100 * each.worst.error:+.0f} % ({each.worst.where})",
        ]
        for each in errors
    ]
    head = ("quantity", "points", "median error", "median, signed", "worst")
    return "\n".join(markdown(head, cells))


def _prefill_table() -> str:
    """Return predicted and measured milliseconds beside each other."""
    by_point: dict[tuple[str, str], dict[str, Check]] = {}
    for check in checks.prefill():
        what, ranks, _ = check.what.split(", ")
        by_point.setdefault((ranks, check.where), {})[what] = check
    cells = []
    for (name, count), rows in published.PREFILL_MS.items():
        for tokens in published.TOKENS[: len(rows)]:
            point = by_point[f"TP={count}", f"{name}, {tokens} tokens"]
            times = [_beside(point[what], ".1f") for what in ("stock", "no-comm", "weave")]
            ratio = _beside(point["stock / weave"], ".2f")
            cells.append([f"{name}, TP={count}", str(tokens), *times, ratio])
    head = ("model", "tokens", "stock ms", "no-comm ms", "weave ms", "stock / weave")
    return "\n".join(markdown(head, cells))


def _beside(check: Check, digits: str) -> str:
    return f"{check.predicted:{digits}} / {check.measured:{digits}}"


def _prediction_table(found: Sequence[Prediction]) -> str:
    cells = [
        [
            f"{each.place}, TP={each.ranks}, {each.transport}",
            str(each.tokens),
            f"{each.times.stock:.0f}",
            f"{each.times.fuse:.0f}",
            f"{each.times.weave:.0f} ({each.times.ctas})",
            f"{each.times.no_comm:.0f}",
            f"{each.times.stock / each.times.fuse:.2f}x",
            f"{each.times.stock / each.times.weave:.2f}x",
        ]
        for each in found
    ]
    head = ("where", "tokens", "stock", "fuse", "weave (CTAs)", "no-comm", "fuse", "weave")
    return "\n".join(markdown(head, cells))


if __name__ == "__main__":
    sys.exit(main())
