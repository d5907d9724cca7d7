"""What a variant of the op benchmark stands for, and what it is compared with."""

from collections.abc import Iterable, Mapping
from enum import Enum

from benchmarks.schema import Result, Row


class Role(Enum):
    """A variant's part in a comparison."""

    FLOOR = "link floor"
    PART = "all-reduce alone"  # does less than the op
    LIMIT = "moved by as many SMs"  # the bytes alone
    RIVAL = "rival"  # all-reduce, residual and norm
    OURS = "ours"


def role(variant: str) -> Role:
    """Return the part of a variant of the op benchmark."""
    if variant == "floor":
        return Role.FLOOR
    if variant.startswith("read+write/"):
        return Role.LIMIT
    ours = ("copy_engine", "push", "push_twice")
    if variant.startswith(("fused/", "multicast/")) or variant in ours:
        return Role.OURS
    return Role.PART if variant in ("nccl", "two_shot") else Role.RIVAL


def ctas(variant: str) -> int | None:
    """Return the thread blocks that a variant's name states, if it does."""
    number = variant.rpartition("/")[2]
    return int(number) if number.isdigit() else None


def by_size(result: Result, shape: str) -> Mapping[int, Mapping[str, Row]]:
    """Return the rows of a shape by tokens and variant, sizes in ascending order."""
    sizes: dict[int, dict[str, Row]] = {}
    for row in sorted(result.rows, key=lambda row: row.tokens):
        if row.shape == shape:
            sizes.setdefault(row.tokens, {})[row.variant] = row
    return sizes


def shapes(result: Result) -> list[str]:
    """Return the shapes of a result in the order of their first rows."""
    return list(dict.fromkeys(row.shape for row in result.rows))


def fastest(rows: Iterable[Row], of: Role, most_ctas: int | None = None) -> Row | None:
    """Return the fastest row of a role, with at most that many thread blocks if it names any."""
    fitting = (
        row
        for row in rows
        if role(row.variant) is of and (most_ctas is None or (ctas(row.variant) or 0) <= most_ctas)
    )
    return min(fitting, key=lambda row: row.time_us, default=None)
