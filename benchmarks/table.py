"""A result as Markdown; of the op: the floor, the best rival and ours at every size."""

from collections.abc import Mapping, Sequence

from benchmarks import prefill_table, serving_table
from benchmarks.roles import Role, by_size, ctas, fastest, shapes
from benchmarks.schema import Meta, Result, Row

SMOKE = (
    "SMOKE TEST: no GPU, or ranks shared one. These times mean nothing; only that everything ran."
)
_HEAD = (
    "tokens",
    "link floor us",
    "best rival us",
    "ours us",
    "speed-up",
    "% of floor",
)


def text(result: Result) -> str:
    """Return Markdown: what ran where, one table per shape, what is absent and why."""
    parts = [heading(result.meta)]
    if result.bench == "op":
        parts += [_shape(result, shape) for shape in shapes(result)]
    elif result.bench in ("prefill", "decode"):
        parts += [_passes(*each) for each in prefill_table.tables(result)]
    elif result.bench == "serving":
        parts += ["\n".join(markdown(*serving_table.cells(result)))]
    else:
        parts += ["\n".join(_by_ctas(result))]
    parts += [_absent(result.meta)]
    return "\n\n".join(part for part in parts if part)


def heading(meta: Meta) -> str:
    """Return one paragraph that says where and with what it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in meta.versions.items())
    lines = [
        meta.place + (f"; {meta.clocks}" if meta.clocks else ""),
        f"{meta.date}; {versions}",
        f"Medians of up to {meta.rounds} interleaved rounds, slowest rank, "
        f"± half the interquartile range; NVLink multicast "
        + (f"forbidden ({meta.multicast})" if meta.multicast else "allowed"),
    ]
    return "\n".join(([SMOKE] if meta.smoke else []) + lines)


def _shape(result: Result, shape: str) -> str:
    sizes = by_size(result, shape)
    lines = _smoke_lines(sizes) if result.meta.smoke else _lines(sizes)
    return f"### {shape}\n\n" + "\n".join(lines)


def _lines(sizes: Mapping[int, Mapping[str, Row]]) -> list[str]:
    cells = []
    for tokens, rows in sizes.items():
        floor = fastest(rows.values(), Role.FLOOR)
        rival = fastest(rows.values(), Role.RIVAL)
        ours = fastest(rows.values(), Role.OURS)
        cells.append(
            [
                str(tokens),
                f"{floor.time_us:{_digits(floor.time_us)}}" if floor else "-",
                _named(rival),
                _named(ours),
                f"{rival.time_us / ours.time_us:.2f}x" if rival and ours else "-",
                f"{100 * floor.time_us / ours.time_us:.0f}" if floor and ours else "-",
            ]
        )
    return markdown(_HEAD, cells)


def _smoke_lines(sizes: Mapping[int, Mapping[str, Row]]) -> list[str]:
    cells = [[str(tokens), ", ".join(sorted(rows))] for tokens, rows in sizes.items()]
    return markdown(("tokens", "ran, with right results"), cells)


def _passes(
    shape: str, times: prefill_table.Cells, columns: Mapping[str, prefill_table.Cells]
) -> str:
    parts = ["\n".join(markdown(*times))]
    for name, cells in columns.items():
        parts += [f"`{name}`:", "\n".join(markdown(*cells))]
    return "\n\n".join([f"### {shape}", *parts])


def _by_ctas(result: Result) -> list[str]:
    """Return microseconds with a column for each number of thread blocks."""
    counts = sorted({ctas(row.variant) or 0 for row in result.rows})
    lines: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in result.rows:
        what = row.variant.partition("/")[0]
        line = lines.setdefault((row.shape, str(row.tokens), what), {})
        line[ctas(row.variant) or 0] = row
    cells = [
        [*names, *(f"{line[c].time_us:.1f}" if c in line else "-" for c in counts)]
        for names, line in lines.items()
    ]
    return markdown(("shape", "tokens", "what", *(f"{c} CTAs us" for c in counts)), cells)


def _named(row: Row | None) -> str:
    if row is None:
        return "-"
    digits = _digits(row.time_us)
    return f"{row.time_us:{digits}} ±{row.spread_us / 2:{digits}} ({row.variant})"


def _digits(time_us: float) -> str:
    return ".2f" if time_us < 10 else ".1f"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, its columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    titles = [cell.rjust(width) for cell, width in zip(head, widths, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rule, *lines)]


def _absent(meta: Meta) -> str:
    if not meta.absent:
        return ""
    return "Absent:\n" + "\n".join(f"- {name}: {why}" for name, why in meta.absent.items())
