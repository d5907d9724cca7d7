"""What all plots of results look like."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.schema import Row

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.dpi": 110,
}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def title(figure: Any, text: str) -> None:
    """Write what was measured where above a figure."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=9, color="#555555")


def band(axes: Any, rows: Mapping[int, Row], style: Mapping[str, Any], unit_us: float = 1) -> None:
    """Draw medians, with half the interquartile range on either side."""
    sizes, times = list(rows), [row.time_us / unit_us for row in rows.values()]
    halves = [row.spread_us / 2 / unit_us for row in rows.values()]
    axes.plot(sizes, times, **style)
    low = [time - half for time, half in zip(times, halves, strict=True)]
    high = [time + half for time, half in zip(times, halves, strict=True)]
    axes.fill_between(sizes, low, high, color=style["color"], alpha=0.2, lw=0)


def size_axis(axes: Any, sizes: Sequence[int], label: str = "tokens") -> None:
    """Make the horizontal axis one of batch sizes."""
    axes.set_xscale("log", base=2)
    shown = sizes[::2] if len(sizes) > 8 else sizes
    axes.set_xticks(shown, [short(count) for count in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def short(count: int) -> str:
    """Return a size as it stands at an axis."""
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)
