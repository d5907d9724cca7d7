"""Hold the model against what was measured: TokenWeave's published figures, and our own."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from benchmarks import model, prefill_table, published
from benchmarks.measured import GEMM_TOKENS, GEMM_US
from benchmarks.model import H100, H200, LLAMA_70B, MIXTRAL, QWEN_72B, Model, Setting
from benchmarks.roles import by_size, ctas, shapes
from benchmarks.schema import load
from sglang_tokenweave.waves import GemmShape, predicted_us

MODELS = {each.name: each for each in (LLAMA_70B, QWEN_72B, MIXTRAL)}
_RESULTS = Path(__file__).parent / "results"
# Prefills of ours that the model is held against. Below so many tokens the CPU is most of a pass;
# above a chunk there are several.
_SHARE = Model("tp8rank", 8, 8192, 16, 2, 128, 7168)
_OUTSIDE = ("prefill-tp8rank-h200x2", _SHARE, 2)  # says what a pass takes beside its layers
_PREFILLS = (
    ("prefill-tp8rank-32l-h200x2-auto", replace(_SHARE, layers=32), 2),
    ("prefill-llama-3.3-70b-h200x2", replace(LLAMA_70B, layers=8), 2),
    ("prefill-llama-3.3-70b-h200x4", replace(LLAMA_70B, layers=8), 4),
    ("prefill-qwen2.5-72b-h200x2", replace(QWEN_72B, layers=8), 2),
    ("prefill-qwen2.5-72b-h200x4", replace(QWEN_72B, layers=8), 4),
    ("prefill-llama-3-8b-h200x2", Model("Llama-3-8B", 8, 4096, 32, 8, 128, 14336), 2),
    ("prefill-qwen3-8b-h200x2", Model("Qwen3-8B", 8, 4096, 32, 8, 128, 12288), 2),
    ("prefill-mixtral-8x22b-h200x2", replace(MIXTRAL, layers=4), 2),
    ("prefill-mixtral-8x22b-h200x4", replace(MIXTRAL, layers=4), 4),
)
_LEAST_TOKENS, _CHUNK = 2048, 8192
_FEW_BLOCKS = 8  # with which SMs are the limit, and not the link


@dataclass(frozen=True)
class Check:
    """One prediction, and what was measured."""

    what: str  # a quantity in one setting
    where: str  # the point
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Error:
    """How far off the predictions of one quantity are."""

    what: str
    points: int
    median: float  # of sizes
    bias: float  # median with its sign
    worst: Check


def errors(checks: Sequence[Check]) -> list[Error]:
    """Summarise by quantity, in the order in which they come."""
    grouped: dict[str, list[Check]] = {}
    for check in checks:
        grouped.setdefault(check.what, []).append(check)
    return [
        Error(
            what,
            len(group),
            statistics.median(abs(check.error) for check in group),
            statistics.median(check.error for check in group),
            max(group, key=lambda check: abs(check.error)),
        )
        for what, group in grouped.items()
    ]


def prefill() -> list[Check]:
    """Compare with figures 11a and 11b: milliseconds of a whole prompt, and ratios of them."""
    found: list[Check] = []
    for (name, ranks), rows in published.PREFILL_MS.items():
        for tokens, row in zip(published.TOKENS, rows, strict=True):
            found += _prefill(name, ranks, tokens, row)
    order = {what: index for index, what in enumerate(sorted({c.what for c in found}, key=_rank))}
    return sorted(found, key=lambda check: order[check.what])


def _prefill(name: str, ranks: int, tokens: int, row: published.Prefill) -> Iterator[Check]:
    setting = Setting(MODELS[name], H100, ranks, multicast=True)
    times, layers = model.layer_times(setting, tokens), setting.model.layers / 1e3
    kind = "dense" if setting.model.experts == 1 else "experts"
    pairs = {
        "stock": (layers * times.stock, row.stock),
        "no-comm": (layers * times.no_comm, row.no_comm),
        "weave": (layers * times.weave, row.weave),
        "stock / no-comm": (times.stock / times.no_comm, row.stock / row.no_comm),
        "stock / weave": (times.stock / times.weave, row.stock / row.weave),
    }
    for what, (predicted, measured) in pairs.items():
        where = f"{name}, {tokens} tokens"
        yield Check(f"{what}, TP={ranks}, {kind}", where, predicted, measured)


def _rank(what: str) -> tuple[bool, bool, str]:
    """Dense before experts, times before ratios."""
    return "experts" in what, "/" in what, what


def ops() -> list[Check]:
    """Compare with figures 4 and 10: microseconds of the parts of one op on 8 H100."""
    found = []
    setting = Setting(LLAMA_70B, H100, 8, multicast=True)
    for tokens, row in published.OP_US.items():
        where = f"{tokens} tokens"
        pairs = {
            "RMSNorm": (model.norm_us(setting, tokens), row.norm),
            "all-reduce, multicast": (model.allreduce_us(setting, tokens), row.allreduce),
            "fused op, multicast": (
                model.fused_us(setting, tokens, model.CTAS_ALONE),
                row.fused,
            ),
        }
        found += [Check(f"{what}, TP=8", where, *pair) for what, pair in pairs.items()]
    for count, measured in published.FUSED_8192_US.items():
        predicted = model.fused_us(setting, 8192, count)
        found.append(
            Check("fused op of 8192 tokens by CTAs, TP=8", f"{count} CTAs", predicted, measured)
        )
    return sorted(found, key=lambda check: check.what)


def own() -> list[Check]:
    """Compare with measurements of ours on H200: one, and several."""
    return _gemms() + _several_gpus()


def _gemms() -> list[Check]:
    return [
        Check(
            "one GEMM, H200",
            f"k {k}, n {n}, {tokens} tokens",
            predicted_us(GemmShape("g", n=n, k=k), tokens, 132),
            measured,
        )
        for (k, n), row in GEMM_US.items()
        for tokens, measured in zip(GEMM_TOKENS, row, strict=True)
    ]


def _several_gpus() -> list[Check]:
    found: list[Check] = []
    for world_size in (2, 4):
        setting = Setting(LLAMA_70B, H200, world_size, multicast=False)
        found += [
            Check(
                f"our kernel at TP={world_size}, "
                + ("up to 8 blocks" if count <= _FEW_BLOCKS else "16 and 32 blocks"),
                f"{row.tokens} tokens, {row.variant}",
                model.fused_us(setting, row.tokens, count),
                row.time_us,
            )
            for row in load(_RESULTS / f"op-h200x{world_size}.json").rows
            if row.variant.startswith("fused/")
            and (count := ctas(row.variant))
            # The model's constants are from some rows of two.
            and (world_size > 2 or (row.tokens, row.variant) not in model.USED)
        ]
    for prefill in _PREFILLS:
        for times in _passes(*prefill):
            found += times.checks()
    return sorted(found, key=lambda check: check.what.startswith("prefill"))


@dataclass(frozen=True)
class _Pass:
    """A prefill that was measured, and its layers as the model has them, in microseconds."""

    setting: Setting
    tokens: int
    layers: Mapping[str, float]
    measured: Mapping[str, float]

    def checks(self) -> Iterator[Check]:
        outside = outside_us()
        predicted = {what: time_us + outside[what] for what, time_us in self.layers.items()}
        experts = ", experts" if self.setting.model.experts > 1 else ""
        where = f"{self.setting.model.name}, TP={self.setting.world_size}, {self.tokens} tokens"
        pairs = {what: (predicted[what], self.measured[what]) for what in predicted}
        speed_ups = [each["stock"] / each["weave"] for each in (predicted, self.measured)]
        pairs["stock / weave"] = speed_ups[0], speed_ups[1]
        for what, pair in pairs.items():
            yield Check(f"prefill, {what}{experts}", where, *pair)


@lru_cache(maxsize=1)
def outside_us() -> Mapping[str, float]:
    """Return what a pass takes beside its layers: embedding, last norm, head, and its launch.

    By the median of what one shape took longer than the model has for its layers; there is no other
    one for stock and for no-comm, which differ in the layers alone.
    """
    passes = list(_passes(*_OUTSIDE))
    longer = {
        what: statistics.median(each.measured[what] - each.layers[what] for each in passes)
        for what in ("no-comm", "weave")
    }
    return {**longer, "stock": longer["no-comm"]}


def _passes(name: str, shape: Model, world_size: int) -> Iterator[_Pass]:
    setting = Setting(shape, H200, world_size, multicast=False)
    result = load(_RESULTS / f"{name}.json")
    (of_shape,) = shapes(result)
    for tokens, rows in by_size(result, of_shape).items():
        if not _LEAST_TOKENS <= tokens <= _CHUNK:
            continue
        stock, mine = prefill_table.stock(rows), prefill_table.ours(rows)
        assert stock is not None
        assert mine is not None
        bound = rows[prefill_table.BOUND]
        times, layers = model.layer_times(setting, tokens), shape.layers
        yield _Pass(
            setting,
            tokens,
            {
                "no-comm": layers * times.no_comm,
                "stock": layers * times.stock,
                "weave": layers * times.weave,
            },
            {"no-comm": bound.time_us, "stock": stock.time_us, "weave": mine.time_us},
        )
