"""The plot of whole servers under load, after figure 12 of the TokenWeave paper."""

import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks import plot_style
from benchmarks.roles import shapes
from benchmarks.schema import Result
from benchmarks.serving_table import NO_COMM, OURS

_COLORS = {"stock": "#b0b0b0", "stock/best": "#6b6b6b", OURS: "#d1495b", NO_COMM: "#e8e8e8"}
_PANELS = (
    ("tokens_per_s", 1.0, "Throughput", "tokens a second, input and output"),
    ("ttft_us", 1e3, "Time to the first token", "ms, median"),
    ("tpot_us", 1e3, "Time of each further token", "ms, median"),
)


def plot(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write one picture of all loads as PNG; return its path."""
    path = folder / f"{stem}.png"
    with plt.rc_context(plot_style.STYLE):
        figure, panels = plt.subplots(1, len(_PANELS), figsize=(12, 4), layout="constrained")
        plot_style.title(figure, f"{_model(result).strip('-')} {result.meta.place}".strip())
        for axes, panel in zip(panels, _PANELS, strict=True):
            _bars(axes, result, *panel)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
        figure.savefig(path)
        plt.close(figure)
    return [path]


def _model(result: Result) -> str:
    """Return what the names of all loads begin with, if the model is a shape."""
    found = re.match(r".*?-\d+l-tp\d+-", result.rows[0].shape)
    return found[0] if found else ""


def _bars(axes: Any, result: Result, column: str, unit: float, title: str, label: str) -> None:
    loads = shapes(result)
    variants = list(dict.fromkeys(row.variant for row in result.rows))
    width = 0.8 / len(variants)
    for index, variant in enumerate(variants):
        found = {
            loads.index(row.shape): row.extra[column] / unit
            for row in result.rows
            if row.variant == variant
        }
        places = [place - 0.4 + (index + 0.5) * width for place in found]
        color = _COLORS.get(variant, "#999999")
        axes.bar(places, list(found.values()), width, color=color, label=variant)
    axes.set(title=title, ylabel=label)
    names = [load.removeprefix(_model(result)).replace("-", "\n") for load in loads]
    axes.set_xticks(range(len(loads)), names, fontsize=7)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
