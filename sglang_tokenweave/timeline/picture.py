"""A timeline as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from sglang_tokenweave.timeline import words
from sglang_tokenweave.timeline.lanes import COLOURS, EXPOSED, HIDDEN, lanes
from sglang_tokenweave.timeline.overlap import Overlap

_STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}


def picture(overlaps: Sequence[tuple[str, Overlap]], path: Path) -> None:
    """Draw each step's streams over time, on one scale, and below them every layer's totals."""
    heights = [h for _, overlap in overlaps for h in (0.4 * (len(lanes(overlap)) + 1), 1.4)]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            len(heights),
            1,
            figsize=(13, 1.2 * len(overlaps) + sum(heights)),
            height_ratios=heights,
            layout="constrained",
        )
        longest = max(overlap.step.end - overlap.step.start for _, overlap in overlaps)
        most = max(t.length for _, o in overlaps for t in o.by_place.values())
        for index, (title, overlap) in enumerate(overlaps):
            _streams(axes[2 * index], title, overlap, longest)
            _layers(axes[2 * index + 1], overlap, most)
        keys = {str(kind): colour for kind, colour in COLOURS.items()}
        keys |= {"hidden": HIDDEN, "exposed": EXPOSED}
        handles = [Patch(color=colour) for colour in keys.values()]
        figure.legend(handles, list(keys), loc="outside lower center", ncols=len(keys))
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _streams(axis: Any, title: str, overlap: Overlap, longest: int) -> None:
    start, drawn = overlap.step.start, lanes(overlap)
    for colour, intervals in (
        (HIDDEN, [each.hidden for each in overlap.timed]),
        (EXPOSED, [each.exposed for each in overlap.timed]),
    ):
        spans = [span for each in intervals for span in each.spans]
        axis.broken_barh([_bar(span, start) for span in spans], (-0.4, 0.8), color=colour, lw=0)
    for row, lane in enumerate(drawn, 1):
        bars = [_bar((a.start, a.end), start) for a, _ in lane.activities]
        colours = [COLOURS[label.kind] for _, label in lane.activities]
        axis.broken_barh(bars, (row - 0.4, 0.8), color=colours, lw=0)
    names = ["communication", *(lane.title for lane in drawn)]
    axis.set_yticks(range(len(names)), names)
    axis.set(xlim=(0, longest / 1e6), ylim=(len(names) - 0.5, -0.5), xlabel="ms")
    axis.set_title(f"{title}\n{words.sentence(overlap)}", loc="left")


def _layers(axis: Any, overlap: Overlap, most: int) -> None:
    totals = list(overlap.by_place.items())
    hidden = [total.hidden / 1e3 for _, total in totals]
    exposed = [total.exposed / 1e3 for _, total in totals]
    axis.bar(range(len(totals)), hidden, color=HIDDEN, width=0.9)
    axis.bar(range(len(totals)), exposed, bottom=hidden, color=EXPOSED, width=0.9)
    shown = range(0, len(totals), -(-len(totals) // 24))
    axis.set_xticks(shown, [_short(str(totals[index][0])) for index in shown])
    axis.set(ylabel="us", ylim=(0, 1.05 * most / 1e3))


def _bar(span: tuple[int, int], start: int) -> tuple[float, float]:
    return (span[0] - start) / 1e6, (span[1] - span[0]) / 1e6


def _short(place: str) -> str:
    return place.replace("layer ", "").replace("attention", "attn").replace("outside the ", "no ")
