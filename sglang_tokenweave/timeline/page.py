"""A timeline as one HTML page that needs nothing else: no server, no network, no library."""

from collections.abc import Iterator, Sequence
from html import escape

from sglang_tokenweave.timeline import words
from sglang_tokenweave.timeline.lanes import COLOURS, EXPOSED, HIDDEN, lanes
from sglang_tokenweave.timeline.layers import Place
from sglang_tokenweave.timeline.overlap import Overlap, Timed

_ROW, _BAR = 26, 18  # pixels
_LABELS = 40  # layers' numbers above the lanes, at most
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem; color: #222; }
h1 { font-size: 1.25rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .2rem; }
.said { font-weight: 600; margin: .2rem 0; } .small { color: #555; font-size: .9em; }
.view { display: flex; margin-top: .5rem; } .names { flex: none; width: 13rem; font-size: 12px; }
.names div { height: 26px; line-height: 26px; white-space: nowrap; overflow: hidden; }
.scroll { flex: auto; overflow-x: auto; } svg { display: block; min-width: 100%; }
svg text { font: 10px system-ui, sans-serif; fill: #555; }
rect:hover { stroke: #000; stroke-width: 1.5; }
table { border-collapse: collapse; margin-top: .6rem; }
th, td { padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 1em; }
"""
# All charts grow together, so that two steps stay on one scale of time.
_SCRIPT = """
const zoom = document.getElementById("zoom");
zoom.addEventListener("input", () => {
  const width = Math.round(100 * Math.pow(2, zoom.value)) + "%";
  for (const chart of document.querySelectorAll("svg")) chart.style.width = width;
});
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(overlaps: Sequence[tuple[str, Overlap]]) -> str:
    """Return the page of one step, or of two to compare; each with its title."""
    length = max(overlap.step.end - overlap.step.start for _, overlap in overlaps)
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{escape(overlaps[0][0])}</title><style>{_STYLE}</style></head><body>",
        "<h1>What communication was hidden, and what exposed</h1>",
        _comparison(overlaps),
        f"<p class=small>{_legend()}",
        '<label>zoom <input id="zoom" type="range" min="0" max="7" step="0.05" value="0"></label>',
        "Point at a bar for its name and times.</p>",
        *(_section(title, overlap, length) for title, overlap in overlaps),
        _table(overlaps),
        f"<script>{_SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _comparison(overlaps: Sequence[tuple[str, Overlap]]) -> str:
    if len(overlaps) < 2:
        return ""
    (_, first), (_, second) = overlaps
    return f"<p class=said>{escape(words.comparison(first, second))}</p>"


def _legend() -> str:
    keys = {str(kind): colour for kind, colour in COLOURS.items()}
    keys |= {"hidden": HIDDEN, "exposed": EXPOSED}
    return "".join(
        f'<span class=key style="background:{colour}"></span>{name}'
        for name, colour in keys.items()
    )


def _section(title: str, overlap: Overlap, length: int) -> str:
    names = ["layer", "communication", *(lane.title for lane in lanes(overlap))]
    rows = "".join(f"<div>{escape(name)}</div>" for name in names)
    height = _ROW * len(names)
    return (
        f"<h2>{escape(title)}</h2><p class=said>{escape(words.sentence(overlap))}</p>"
        f"<p class=small>{escape(words.summary(overlap))}</p>"
        f'<div class=view><div class=names>{rows}</div><div class=scroll><svg height="{height}">'
        f"{''.join(_bars(overlap, length))}</svg></div></div>"
    )


def _bars(overlap: Overlap, length: int) -> Iterator[str]:
    start = overlap.step.start
    yield from _layer_labels(overlap, length)
    for timed in overlap.timed:
        for spans, colour in ((timed.hidden, HIDDEN), (timed.exposed, EXPOSED)):
            for first, last in spans.spans:
                yield _bar((first - start, last - start), length, 1, colour, _told(timed))
    for index, lane in enumerate(lanes(overlap)):
        for activity, label in lane.activities:
            span = (activity.start - start, activity.end - start)
            told = f"{activity.name}\n{words.duration(activity.end - activity.start)}"
            yield _bar(span, length, 2 + index, COLOURS[label.kind], f"{told} {label.family}")


def _layer_labels(overlap: Overlap, length: int) -> Iterator[str]:
    firsts: dict[int, int] = {}
    for timed in overlap.timed:
        if timed.place.layer is not None:
            firsts.setdefault(timed.place.layer, timed.operation.start)
    every = -(-len(firsts) // _LABELS)
    for layer, start in list(firsts.items())[:: every or 1]:
        x = 100 * (start - overlap.step.start) / length
        yield f'<text x="{x:.4f}%" y="{_BAR}">{layer}</text>'


def _bar(span: tuple[int, int], length: int, row: int, colour: str, told: str) -> str:
    x, width = 100 * span[0] / length, 100 * (span[1] - span[0]) / length
    return (
        f'<rect x="{x:.4f}%" y="{row * _ROW + 4}" width="{width:.4f}%" height="{_BAR}" '
        f'fill="{colour}"><title>{escape(told)}</title></rect>'
    )


def _told(timed: Timed) -> str:
    hidden, exposed = (words.duration(each.length) for each in (timed.hidden, timed.exposed))
    return f"{timed.place} ({timed.operation.family}): {hidden} hidden, {exposed} exposed"


def _table(overlaps: Sequence[tuple[str, Overlap]]) -> str:
    """Return hidden and exposed time by place, the steps beside each other."""
    totals = [overlap.by_place for _, overlap in overlaps]
    places: list[Place] = list(dict.fromkeys(place for each in totals for place in each))
    places.sort(key=lambda place: (place.layer is None, place.layer or 0, place.block))
    head = "".join(f"<th>{escape(title)}: hidden us<th>exposed us" for title, _ in overlaps)
    rows = []
    for place in places:
        cells = []
        for by_place in totals:
            total = by_place.get(place)
            numbers = ("-", "-") if total is None else (_us(total.hidden), _us(total.exposed))
            cells += [f"<td>{number}</td>" for number in numbers]
        rows.append(f"<tr><td>{place}</td>{''.join(cells)}</tr>")
    return f"<h2>By layer</h2><table><tr><th>where{head}</tr>{''.join(rows)}</table>"


def _us(nanoseconds: int) -> str:
    return f"{nanoseconds / 1000:.1f}"
