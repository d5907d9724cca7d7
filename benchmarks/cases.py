"""What is measured, how often, and how long that takes: pure functions, alike on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass

TOKENS = tuple(2**power for power in range(16))
HIDDEN = (4096, 5120, 7168, 8192)
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}  # our names: torch's
ELEMENT_BYTES = 2

FLOOR_BYTES = 64 * 2**20  # per direction and copy: long against the ranks' skew of some 50 us
FLOOR_CALLS = 8
REPLAYS = 3  # timed ones per round; their median is the round's sample
MIN_ROUNDS, MAX_ROUNDS = 5, 41
_MOST_BUFFERS = 8
# In place and without norm, each call multiplies by up to the world size (8): 2**3 a call, and
# bf16 ends at 2**127.
_MOST_CALLS_PER_FILL = 40


@dataclass(frozen=True)
class Case:
    """One size of the op."""

    hidden: int
    dtype: str  # of DTYPES
    tokens: int

    @property
    def shape(self) -> str:
        """Return the shape's name in the results."""
        return f"h{self.hidden}-{self.dtype}"

    @property
    def bytes(self) -> int:
        """Return the bytes of one rank's activations, S in the formulas."""
        return self.tokens * self.hidden * ELEMENT_BYTES


def grid(hidden: Sequence[int], dtype: str, tokens: Sequence[int]) -> list[Case]:
    """Return the cases, sizes of one shape together.

    Raises:
        ValueError: naming what came and what is allowed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: allowed are {', '.join(DTYPES)}")
    for value in hidden:
        if not 0 < value <= 16384 or value % 8:
            raise ValueError(f"hidden {value}: it must be a multiple of 8 up to 16384")
    for value in tokens:
        if not 0 < value <= 2**17:
            raise ValueError(f"tokens {value}: from 1 to {2**17}")
    return [Case(h, dtype, t) for h in dict.fromkeys(hidden) for t in sorted(set(tokens))]


def floor_bytes(case: Case, world_size: int) -> float:
    """Return the bytes that must leave each GPU: reduce-scatter and all-gather over unicast."""
    return 2 * (world_size - 1) / world_size * case.bytes


def floor_us(case: Case, world_size: int, rate_gb_s: float) -> float:
    """Return the least time that the link allows at a measured rate per direction."""
    return floor_bytes(case, world_size) / rate_gb_s / 1e3


def num_buffers(case: Case, cache_bytes: int) -> int:
    """Return over how many buffers the calls rotate, so that a call does not find its data cached.

    In a model, the residual was last touched before the weights of several GEMMs went through the
    cache. Small sizes keep at most 8 buffers: there, latency hides what the cache does.
    """
    touched = 2 * case.bytes  # partial sums and residual
    return max(1, min(_MOST_BUFFERS, -(-2 * cache_bytes // touched)))


def num_calls(case: Case, world_size: int, buffers: int, *, smoke: bool) -> int:
    """Return the calls in one CUDA graph: the same number on each buffer, about 1 ms in all."""
    if smoke:  # a call takes several of the driver's time slices
        return buffers
    on_each = round(1000 / guess_us(case, world_size) / buffers)
    return buffers * max(1, min(on_each, _MOST_CALLS_PER_FILL // (REPLAYS + 1)))


def guess_us(case: Case, world_size: int) -> float:
    """Return about how long a call takes, for planning only."""
    return 20 + floor_us(case, world_size, rate_gb_s=200)


@dataclass(frozen=True)
class Plan:
    """How often a run measures, and how long that will take."""

    rounds: int
    fixed_s: float  # starting, compiling, checking, capturing
    round_s: float

    @property
    def seconds(self) -> float:
        """Return the estimate for the whole run."""
        return self.fixed_s + self.rounds * self.round_s


def plan(
    cases: Sequence[Case],
    num_variants: int,
    world_size: int,
    seconds: float,
    *,
    cache_bytes: int,
    start_s: float,
    smoke: bool = False,
) -> Plan:
    """Choose as many rounds as the time allows.

    Raises:
        ValueError: not even the fewest rounds fit; the text says what would.
    """
    round_s, fixed_s = 0.0, start_s
    for case in cases:
        calls = num_calls(case, world_size, num_buffers(case, cache_bytes), smoke=smoke)
        # 1.5: variants on few thread blocks take up to 5 times the floor; 2 ms: between graphs.
        call_us = 5e4 if smoke else 1.5 * guess_us(case, world_size)
        round_s += num_variants * (2e-3 + calls * (REPLAYS + 1) * call_us / 1e6)
        fixed_s += num_variants * (0.05 + case.bytes * world_size / 20e9)
    fewest = 1 if smoke else MIN_ROUNDS
    rounds = min(MAX_ROUNDS, int((seconds - fixed_s) / round_s))
    if rounds < fewest:
        raise ValueError(
            f"{seconds:.0f} s are too few: {len(cases)} sizes of {num_variants} variants take "
            f"about {fixed_s + fewest * round_s:.0f} s; give more --seconds, or fewer --tokens, "
            "--hidden or --variants"
        )
    return Plan(min(rounds, 3) if smoke else rounds, fixed_s, round_s)
