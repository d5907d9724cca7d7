"""The one schema of every benchmark's results, checked when a file is read."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "nccl", "cuda", "sglang", "flashinfer", "sglang_tokenweave")
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Bench:
    """What one benchmark may report."""

    variants: str  # a regular expression that a whole variant name matches
    columns: tuple[str, ...] = ()  # optional numbers of a row, each with its unit in its name


COMMIT = r"[0-9a-f]{7,40}(-dirty)?"  # of the tree that was measured

# Of the batches of a server that decides by itself: which plan it had for how many of them.
SHARES = ("off_share", "fuse_share", "weave_share")

BENCHES: Mapping[str, Bench] = {
    "op": Bench(
        r"floor|nccl(\+norm)?|two_shot(\+norm)?|one_shot\+norm|sglang_v2(_raised)?\+norm"
        r"|flashinfer(/oneshot)?|(fused|multicast|read\+write)/\d+|copy_engine|push(_twice)?",
        ("relative_error", "rate_gb_s"),
    ),
    "one_gpu": Bench(r"(fused|read|write|read\+write)/\d+"),
    "prefill": Bench(
        r"(stock|fuse|weave)(/[a-z0-9_.-]+)*|auto|no_comm",
        ("cpu_us_per_layer", "tokens_per_s", "cut_tokens", "ctas_count", *SHARES),
    ),
    "decode": Bench(
        r"(stock|fuse|weave)(/[a-z0-9_.-]+)*|auto|no_comm",
        ("tokens_per_s", "context_tokens", *SHARES),
    ),
    "serving": Bench(
        r"(stock|tokenweave|no_comm)(/[a-z0-9_.-]+)*",
        ("ttft_us", "tpot_us", "requests_per_s", "tokens_per_s", "goodput_requests_per_s"),
    ),
}


class SchemaError(ValueError):
    """A file of results is not what the schema says; the text names the file and the field."""


@dataclass(frozen=True)
class Meta:
    """Where, when and with what a file's rows were measured."""

    date: str  # ISO 8601, with the offset from UTC
    gpu: str  # one name: the GPUs of a run are alike
    driver: str
    world_size: int
    versions: Mapping[str, str]  # by the names of VERSIONS
    commit: str
    command: str
    rounds: int  # the most that a row's median is taken over
    clocks: str = ""  # SM clock and power limit, as the driver states them
    multicast: str = ""  # the switch that forbids NVLink multicast; empty: none does
    absent: Mapping[str, str] = field(default_factory=dict)  # what did not run, and why
    smoke: bool = False  # no GPU, or ranks shared one: the times mean nothing

    @property
    def place(self) -> str:
        """Return the GPUs, their driver and the commit, for a heading."""
        commit, _, changed = self.commit.partition("-")
        dirty = "-dirty" if changed else ""
        return (
            f"{self.world_size} ranks, {self.gpu}, driver {self.driver}, "
            f"commit {commit[:12]}{dirty}"
        )


@dataclass(frozen=True)
class Row:
    """One variant at one size: medians over rounds, of the slowest rank in each."""

    shape: str  # "h8192-bf16"
    tokens: int
    variant: str
    time_us: float
    spread_us: float  # interquartile range over the rounds
    extra: Mapping[str, float] = field(default_factory=dict)  # by the names of Bench.columns


@dataclass(frozen=True)
class Result:
    """A file of results."""

    bench: str
    meta: Meta
    rows: tuple[Row, ...]

    def save(self, path: Path) -> None:
        """Write the file; a reader never sees half of it.

        Raises:
            SchemaError: a row or the meta data would not be read back.
        """
        data = {
            "bench": self.bench,
            "meta": asdict(self.meta),
            "rows": [_flat(row) for row in self.rows],
        }
        parse(data, str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.replace(path)


def load(path: Path) -> Result:
    """Read a file of results.

    Raises:
        SchemaError: it cannot be read, or is not what the schema says.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SchemaError(f"{path}: cannot be read as JSON: {error}") from error
    return parse(data, str(path))


def parse(data: Any, source: str) -> Result:
    """Check decoded JSON; `source` names it in errors.

    Raises:
        SchemaError: naming the row and the field, what came and what is allowed.
    """
    whole = _Fields(data, source, ("bench", "meta", "rows"))
    name = whole.text("bench", "|".join(BENCHES))
    rows = whole.get("rows", list)
    parsed = tuple(_row(row, f"{source}: rows[{i}]", BENCHES[name]) for i, row in enumerate(rows))
    seen: dict[tuple[str, int, str], int] = {}
    for index, row in enumerate(parsed):
        first = seen.setdefault((row.shape, row.tokens, row.variant), index)
        if first != index:
            raise SchemaError(
                f"{source}: rows[{index}] repeats shape, tokens and variant of rows[{first}]"
            )
    return Result(name, _meta(whole.get("meta", dict), f"{source}: meta"), parsed)


def _meta(data: Any, source: str) -> Meta:
    fields = _Fields(data, source, tuple(Meta.__dataclass_fields__))
    versions = _Fields(fields.get("versions", dict), f"{source}.versions", VERSIONS)
    absent = _Fields(fields.get("absent", dict, {}), f"{source}.absent", None)
    return Meta(
        date=fields.text("date", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d"),
        gpu=fields.text("gpu"),
        driver=fields.text("driver"),
        world_size=fields.whole_number("world_size"),
        versions={name: versions.text(name) for name in VERSIONS},
        commit=fields.text("commit", COMMIT),
        command=fields.text("command"),
        rounds=fields.whole_number("rounds"),
        clocks=fields.get("clocks", str, ""),
        multicast=fields.get("multicast", str, ""),
        absent={name: absent.text(name) for name in absent.data},
        smoke=fields.get("smoke", bool, False),
    )


def _row(data: Any, source: str, bench: Bench) -> Row:
    known = ("shape", "tokens", "variant", "time_us", "spread_us")
    fields = _Fields(data, source, known + bench.columns)
    return Row(
        shape=fields.text("shape", r"[A-Za-z0-9_.-]+"),
        tokens=fields.whole_number("tokens"),
        variant=fields.text("variant", bench.variants),
        time_us=fields.number("time_us", above=0.0),
        spread_us=fields.number("spread_us"),
        extra={name: fields.number(name) for name in bench.columns if name in fields.data},
    )


def _flat(row: Row) -> dict[str, Any]:
    data = asdict(row)
    extra: dict[str, Any] = data.pop("extra")
    return {**data, **extra}


class _Fields:
    """A JSON object's fields, each checked as it is taken."""

    def __init__(self, data: Any, source: str, known: tuple[str, ...] | None) -> None:
        self.data = data
        self._source = source
        if not isinstance(data, dict):
            raise SchemaError(f"{source}: expected an object, got {data!r}")
        unknown = [] if known is None else [name for name in data if name not in known]
        if unknown:
            raise SchemaError(
                f"{source}.{unknown[0]}: unknown field; allowed: {', '.join(known or ())}"
            )

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.data.get(name, default)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            self._refuse(name, value, f"expected {kind.__name__}")
        return value

    def text(self, name: str, pattern: str = r"(?s).*\S.*") -> str:
        value: str = self.get(name, str)
        if not re.fullmatch(pattern, value):
            self._refuse(name, value, f"expected text that matches {pattern}")
        return value

    def whole_number(self, name: str) -> int:
        value: int = self.get(name, int)
        if value < 1:
            self._refuse(name, value, "expected 1 or more")
        return value

    def number(self, name: str, above: float | None = None) -> float:
        value = self.data.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(name, value, "expected a number")
        if not math.isfinite(value) or value < 0 or (above is not None and value <= above):
            allowed = "0 or more" if above is None else f"more than {above:g}"
            self._refuse(name, value, f"expected {allowed}, finite")
        return float(value)

    def _refuse(self, name: str, value: Any, allowed: str) -> None:
        came = "nothing" if name not in self.data else repr(value)
        raise SchemaError(f"{self._source}.{name}: {allowed}, got {came}")
