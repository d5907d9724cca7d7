"""Made-up results of the op's benchmark, for the tests of what is done with them."""

from dataclasses import replace

from benchmarks import cases
from benchmarks.schema import VERSIONS, Meta, Result, Row

META = Meta(
    date="2026-01-02T03:04:05+00:00",
    gpu="NVIDIA H200",
    driver="580.65",
    world_size=2,
    versions=dict.fromkeys(VERSIONS, "1.0"),
    commit="0123456789abcdef",
    command="python -m benchmarks.op",
    rounds=9,
)
CTAS = {2: 6.0, 4: 2.9, 8: 1.5, 16: 1.1, 32: 1.05}  # thread blocks: time over the floor


def rows_of(tokens, shape="h8192-bf16"):
    """Return rows that clear every bar."""
    floor = 0.0485 * tokens
    times = {
        "floor": floor,
        "nccl": floor + 20,
        "nccl+norm": floor * 1.2 + 25,
        "two_shot": floor * 1.06 + 9,
        "flashinfer": floor * 1.3 + 6,
        "copy_engine": floor * 1.1 + 10,
        **{f"fused/{ctas}": floor * ratio + 5 for ctas, ratio in CTAS.items()},
    }
    if tokens >= 1024:
        times |= {f"fused/{ctas}": floor * ratio for ctas, ratio in CTAS.items()}
    return [Row(shape, tokens, name, time_us, time_us / 50) for name, time_us in times.items()]


def result_of(**meta):
    rows = [row for tokens in cases.TOKENS for row in rows_of(tokens)]
    rows[0] = replace(rows[0], extra={"rate_gb_s": 337.0})
    return Result("op", replace(META, **meta), tuple(rows))
