"""The tables of the benchmarks of prefill and decode: stock, ours and the bound at every size."""

from collections.abc import Mapping, Sequence

from benchmarks.roles import by_size, shapes
from benchmarks.schema import BENCHES, SHARES, Result, Row

BOUND = "no_comm"

Rows = Mapping[str, Row]
Cells = tuple[Sequence[str], list[Sequence[str]]]  # a head, and rows


def stock(rows: Rows) -> Row | None:
    """Return the fastest stock configuration."""
    found = (row for row in rows.values() if row.variant.startswith("stock/"))
    return min(found, key=lambda row: row.time_us, default=None)


def ours(rows: Rows) -> Row | None:
    """Return the fastest of ours: what `auto` chose if it took part, else all variants count."""
    if "auto" in rows:
        return rows["auto"]
    found = (row for row in rows.values() if not row.variant.startswith(("stock/", BOUND)))
    return min(found, key=lambda row: row.time_us, default=None)


def tables(result: Result) -> list[tuple[str, Cells, dict[str, Cells]]]:
    """Return for each shape its name, its times in ms with the ratios, and its other columns."""
    columns = [
        name
        for name in BENCHES[result.bench].columns
        if name not in SHARES and any(name in row.extra for row in result.rows)
    ]
    return [
        (shape, _times(result, shape), {name: _column(result, shape, name) for name in columns})
        for shape in shapes(result)
    ]


def _times(result: Result, shape: str) -> Cells:
    names, sizes = _variants(result, shape), by_size(result, shape)
    head = ("tokens", *(f"{name} ms" for name in names), "speed-up", "% of no_comm")
    cells: list[Sequence[str]] = []
    for tokens, rows in sizes.items():
        best, mine, bound = stock(rows), ours(rows), rows.get(BOUND)
        cells.append(
            [
                str(tokens),
                *(_ms(rows[name]) if name in rows else "-" for name in names),
                f"{best.time_us / mine.time_us:.2f}x ({_ran(mine)})" if best and mine else "-",
                f"{100 * bound.time_us / mine.time_us:.0f}" if bound and mine else "-",
            ]
        )
    return head, cells


def _ran(row: Row) -> str:
    """Return a variant, and the plans that it chose where it chooses."""
    plans = [name.removesuffix("_share") for name in SHARES if row.extra.get(name)]
    return ": ".join([row.variant, *filter(None, [", ".join(plans)])])


def _column(result: Result, shape: str, column: str) -> Cells:
    names, sizes = _variants(result, shape), by_size(result, shape)

    def value(rows: Rows, name: str) -> str:
        return f"{rows[name].extra[column]:.4g}" if _has(rows, name, column) else "-"

    cells: list[Sequence[str]] = [
        [str(tokens), *(value(rows, name) for name in names)] for tokens, rows in sizes.items()
    ]
    return ("tokens", *names), cells


def _has(rows: Rows, name: str, column: str) -> bool:
    return name in rows and column in rows[name].extra


def _variants(result: Result, shape: str) -> list[str]:
    return list(dict.fromkeys(row.variant for row in result.rows if row.shape == shape))


def _ms(row: Row) -> str:
    digits = 2 if row.time_us >= 2000 else 3
    return f"{row.time_us / 1e3:.{digits}f} ±{row.spread_us / 2e3:.{digits}f}"
