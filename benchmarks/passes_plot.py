"""The plots of prefills and decodes, after figures 2, 9 and 11 of the TokenWeave paper."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks import plot_style, prefill_table
from benchmarks.prefill_table import BOUND, Rows
from benchmarks.roles import by_size, shapes
from benchmarks.schema import Result, Row

_COLORS = {
    "stock/default": "#b0b0b0",
    "stock/raised": "#6b6b6b",
    BOUND: "#222222",
    "auto": "#d1495b",
    "fuse": "#2a9d8f",
    "weave/kernel/4": "#7fb3de",
    "weave/kernel/8": "#0b5fa5",
    "weave/copy": "#e6a817",
    "weave/eager": "#8c6bb1",
}


def plot(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write a picture of every shape as PNG; return their paths."""
    paths = []
    with plt.rc_context(plot_style.STYLE):
        for shape in shapes(result):
            figure = _draw(result, shape)
            paths.append(folder / f"{stem}-{shape}-tokens.png")
            figure.savefig(paths[-1])
            plt.close(figure)
    return paths


def _draw(result: Result, shape: str) -> Any:
    sizes = by_size(result, shape)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    plot_style.title(figure, f"{shape}: {result.meta.place}")
    best = {size: row for size, rows in sizes.items() if (row := prefill_table.stock(rows))}
    for name, rows in _lines(sizes).items():
        plot_style.band(left, rows, _style(name), unit_us=1e3)
        if not name.startswith("stock/"):
            ratios = {n: best[n].time_us / row.time_us for n, row in rows.items() if n in best}
            right.plot(list(ratios), list(ratios.values()), **_style(name))
    left.set(title="Time of a pass", ylabel="ms, median ± half the interquartile range")
    left.set_yscale("log")
    left.yaxis.set_major_formatter(plot_style.PLAIN)
    left.yaxis.set_minor_formatter(plot_style.PLAIN)
    right.axhline(1, color="#6b6b6b", lw=1.2)
    right.set(title="Over the fastest stock configuration", ylabel="its time / this one's")
    for axes in (left, right):
        label = "requests" if result.bench == "decode" else "tokens"
        plot_style.size_axis(axes, list(sizes), label)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def _lines(sizes: Mapping[int, Rows]) -> dict[str, dict[int, Row]]:
    lines: dict[str, dict[int, Row]] = {}
    for size, rows in sizes.items():
        for name, row in rows.items():
            lines.setdefault(name, {})[size] = row
    return lines


def _style(name: str) -> dict[str, Any]:
    is_ours = not name.startswith(("stock/", BOUND))
    return {
        "color": _COLORS.get(name, "#999999"),
        "lw": 2.0 if is_ours else 1.2,
        "ls": "--" if name == BOUND else "-",
        "marker": "o" if is_ours else "",
        "ms": 4,
        "label": "no communication" if name == BOUND else name,
    }
