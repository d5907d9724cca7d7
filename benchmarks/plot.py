"""The plots of results; the op's after figures 4, 5, 7 and 10 of the TokenWeave paper."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from benchmarks import passes_plot, plot_style, serving_plot
from benchmarks.plot_style import band, short, size_axis
from benchmarks.roles import Role, by_size, ctas, fastest, role, shapes
from benchmarks.schema import Result, Row

PLOTTED = ("op", "prefill", "decode", "serving")
_OURS_COLORS = {
    "fused": "#0b5fa5",
    "multicast": "#2a9d8f",
    "copy_engine": "#d1495b",
    "push": "#e6a817",
    "push_twice": "#b5651d",
}
# One colour each, the same in every plot, whichever of them a file has.
_OTHER_COLORS = {
    "nccl": "#b0b0b0",
    "nccl+norm": "#6b6b6b",
    "two_shot": "#c5b0d5",
    "two_shot+norm": "#8c6bb1",
    "one_shot+norm": "#41a5a0",
    "sglang_v2+norm": "#c9a227",
    "sglang_v2_raised+norm": "#b07d00",
    "flashinfer": "#5aa02c",
    "flashinfer/oneshot": "#a1d076",
}
_BEST = ", best CTA count"
_CTAS_TOKENS = 64  # below, the number of thread blocks changes little
_RATIO_TICKS = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16)

Sizes = Mapping[int, Mapping[str, Row]]


def plot(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write the plots of every shape as PNG; return their paths.

    Raises:
        ValueError: it is a smoke test, or of another benchmark.
    """
    if result.bench not in PLOTTED or result.meta.smoke:
        what = "a smoke test" if result.meta.smoke else f"the benchmark {result.bench!r}"
        raise ValueError(f"no plots of {what}")
    folder.mkdir(parents=True, exist_ok=True)
    if result.bench == "serving":
        return serving_plot.plot(result, folder, stem)
    if result.bench != "op":
        return passes_plot.plot(result, folder, stem)
    paths = []
    with plt.rc_context(plot_style.STYLE):
        for shape in shapes(result):
            for name, draw in (("tokens", _against_tokens), ("ctas", _against_ctas)):
                path = folder / f"{stem}-{shape}-{name}.png"
                figure = draw(by_size(result, shape), f"{shape}: {result.meta.place}")
                if figure is not None:
                    figure.savefig(path)
                    plt.close(figure)
                    paths.append(path)
    return paths


def _against_tokens(sizes: Sizes, title: str) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plot_style.title(figure, title)
    floor = {tokens: rows["floor"].time_us for tokens, rows in sizes.items() if "floor" in rows}
    left.plot(list(floor), list(floor.values()), "k--", lw=1.2, label="link floor")
    lines = _lines(sizes)
    for name in sorted(lines, key=_legend_order):
        rows, style = lines[name], _style(name)
        band(left, rows, style)
        fraction = {t: 100 * floor[t] / row.time_us for t, row in rows.items() if t in floor}
        right.plot(list(fraction), list(fraction.values()), **style)
    left.set(title="Latency", ylabel="us, median ± half the interquartile range", yscale="log")
    left.yaxis.set_major_formatter(plot_style.PLAIN)
    # The floor of a few tokens is far below what any launch can reach.
    times = [row.time_us for rows in lines.values() for row in rows.values()]
    left.set_ylim(bottom=min(times, default=1) / 2)
    right.axhline(100, color="k", ls="--", lw=1.2)
    right.set(title="Fraction of the link floor", ylabel="floor / time, %", ylim=(0, 105))
    for axes in (left, right):
        size_axis(axes, list(sizes))
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def _against_ctas(sizes: Sizes, title: str) -> Any:
    several = {tokens: _by_ctas(rows) for tokens, rows in sizes.items() if tokens >= _CTAS_TOKENS}
    lines = {tokens: times for tokens, times in several.items() if len(times) > 1}
    lines = dict(sorted(lines.items(), reverse=True)[::2])  # every second size can be told apart
    if not lines:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plot_style.title(figure, title)
    colors = plt.get_cmap("viridis_r")
    for index, (tokens, times) in enumerate(sorted(lines.items())):
        color = colors(0.15 + 0.85 * index / max(1, len(lines) - 1))
        style = {"color": color, "marker": "o", "ms": 3.5, "lw": 1.6, "label": short(tokens)}
        left.plot(list(times), list(times.values()), **style)
        floor = sizes[tokens].get("floor")
        if floor is not None:
            left.axhline(floor.time_us, color=color, ls=":", lw=0.9)
            ratios = [time_us / floor.time_us for time_us in times.values()]
            right.plot(list(times), ratios, **style)
    left.set(title="Latency of the fused kernel; dotted: link floor", ylabel="us", yscale="log")
    right.set(title="Time over the link floor", ylabel="time / floor", yscale="log")
    right.axhline(1, color="k", ls="--", lw=1.2)
    most = max(right.get_ylim()[1], 2)
    right.set_yticks([tick for tick in _RATIO_TICKS if tick <= most])
    for axes in (left, right):
        _ctas_axis(axes, sorted({count for times in lines.values() for count in times}))
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", title="tokens", reverse=True)
    return figure


def _lines(sizes: Sizes) -> dict[str, dict[int, Row]]:
    """Return every variant's rows by tokens; of our kernel, the best count at each size."""
    lines: dict[str, dict[int, Row]] = {}
    for tokens, rows in sizes.items():
        for name, row in rows.items():
            if role(name) is not Role.FLOOR and ctas(name) is None:
                lines.setdefault(name, {})[tokens] = row
        for kind in ("fused", "multicast"):
            counts = [row for name, row in rows.items() if name.startswith(f"{kind}/")]
            best = fastest(counts, Role.OURS)
            if best is not None:
                lines.setdefault(kind + _BEST, {})[tokens] = best
    return lines


def _legend_order(name: str) -> tuple[bool, bool, str]:
    """Ours first, then whole rivals, then what does less."""
    return (_color_of_ours(name) is None, role(name) is Role.PART, name)


def _by_ctas(rows: Mapping[str, Row]) -> dict[int, float]:
    times = {
        ctas(name) or 0: row.time_us for name, row in rows.items() if name.startswith("fused/")
    }
    return dict(sorted(times.items()))


def _style(name: str) -> dict[str, Any]:
    color = _color_of_ours(name)
    if color is not None:
        return {"color": color, "lw": 2.4, "marker": "o", "ms": 4, "zorder": 3, "label": name}
    alone = role(name) is Role.PART
    label = f"{name} (no norm)" if alone else name
    color = _OTHER_COLORS.get(name, "#999999")
    return {"color": color, "lw": 1.2, "ls": ":" if alone else "-", "label": label}


def _color_of_ours(name: str) -> str | None:
    return _OURS_COLORS.get(name.removesuffix(_BEST))


def _ctas_axis(axes: Any, counts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("thread blocks (CTAs)")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(plot_style.PLAIN)
    axes.yaxis.set_minor_locator(NullLocator())
