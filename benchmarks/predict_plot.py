"""Predicted times over measured ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.checks import Check

_COLOURS = {
    "stock": "#6b6b6b",
    "no-comm": "#2a9d8f",
    "weave": "#0b5fa5",
    "stock / no-comm": "#2a9d8f",
    "stock / weave": "#0b5fa5",
    "one GEMM": "#d08a2e",
    "our kernel at TP=2 without a link": "#d1495b",
    "our kernel at TP=2": "#7a4fa3",
    "our kernel at TP=4": "#0b5fa5",
    "prefill": "#2a9d8f",
}
_STYLE = {"svg.hashsalt": "tokenweave", "font.size": 8, "svg.fonttype": "none"}


def plot(prefill: Sequence[Check], own: Sequence[Check], path: Path) -> None:
    """Write one figure: published prefill times, ratios of them, measurements of our own."""
    times = [check for check in prefill if "/" not in check.what]
    ratios = [check for check in prefill if "/" in check.what]
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
        _panel(axes[0], times, "Prefill on 4 and 8 H100, ms", log=True)
        _panel(axes[1], ratios, "Speed-ups from these", log=False)
        own_times = [check for check in own if "/" not in check.what]
        _panel(axes[2], own_times, "Measurements of ours on H200, us", log=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _panel(axis: Any, found: Sequence[Check], title: str, *, log: bool) -> None:
    low = min(min(check.predicted, check.measured) for check in found)
    high = max(max(check.predicted, check.measured) for check in found)
    axis.plot([low, high], [low, high], color="#aaaaaa", lw=1, zorder=0)
    for name, colour in _COLOURS.items():
        points = [check for check in found if check.what.split(", ")[0] == name]
        if points:
            x, y = [p.measured for p in points], [p.predicted for p in points]
            axis.scatter(x, y, s=11, color=colour, label=name, alpha=0.8, lw=0)
    axis.set(title=title, xlabel="measured", ylabel="predicted")
    if log:
        axis.set(xscale="log", yscale="log")
    axis.legend(frameon=False, loc="upper left")
