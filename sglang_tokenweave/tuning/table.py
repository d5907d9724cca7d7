"""The tuned table: what was measured for each mode and batch size, and what was chosen there."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from sglang_tokenweave.plan import MOST_ONE_SHOT_TOKENS, Kind, Mode
from sglang_tokenweave.tuning import checks
from sglang_tokenweave.waves import LayerShape, transformer_layer

LEAST_ROUNDS = 5  # of a candidate that is chosen, and of OFF beside it
NOISE = 0.015  # of OFF's time: a candidate that gains less may have gained nothing
LEAST_SMS = 16  # left to the computation: with fewer, a GEMM would be the slower of the two
MOST_TOKENS = 1 << 24  # of a batch; far above any chunk


@dataclass(frozen=True)
class Key:
    """What a table was measured on; on anything else it says nothing.

    Raises:
        ValueError: naming the field, what came and what is allowed.
    """

    gpu: str
    sms: int
    driver: str
    model: str  # architecture, as in the model's config.json
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of one expert, if there are several
    experts: int  # 1: a dense model
    top_k: int  # experts that a token visits
    layers: int
    dtype: str
    quantization: str  # "none" without
    tp_size: int
    transport: str
    sglang: str
    tokenweave: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is str:
                checks.name(field.name, value)
            else:
                checks.integer(field.name, value, 1, MOST_TOKENS)
        self.layer  # noqa: B018 - sizes that do not divide among the ranks are refused here

    @property
    def layer(self) -> LayerShape:
        """Return the GEMMs of one layer on one rank."""
        return transformer_layer(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            experts=self.experts,
            top_k=self.top_k,
            world_size=self.tp_size,
        )

    def differences(self, other: "Key") -> str:
        """Return the fields that differ, with both values; empty if the keys are equal."""
        names = [field.name for field in fields(self)]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return ", ".join(
            f"{name} {ours!r} (here {here!r})" for name, ours, here in pairs if ours != here
        )


@dataclass(frozen=True)
class Candidate:
    """One way to run a batch.

    Raises:
        ValueError: naming the field, what came and what is allowed.
    """

    kind: Kind
    cut_offset: int = 0  # tokens added to the planner's cut; 0 unless WEAVE
    ctas: int = 0  # of the op beside a computation; of a WEAVE, 0 means the copy engines
    fuse_ctas: int = 0  # of the op alone on its stream; of a FUSE, 0 means the one-shot op

    def __post_init__(self) -> None:
        if type(self.kind) is not Kind:
            raise ValueError(f"kind: got {self.kind!r}; expected one of {', '.join(Kind)}")
        weaves, runs = self.kind is Kind.WEAVE, self.kind is not Kind.OFF
        self._check_ctas("ctas", 0, is_used=weaves)
        self._check_ctas("fuse_ctas", 2 if weaves else 0, is_used=runs)
        bound = MOST_TOKENS if weaves else 0
        checks.integer("cut_offset", self.cut_offset, -bound, bound)

    @property
    def needs_copy_engines(self) -> bool:
        return self.kind is Kind.WEAVE and self.ctas == 0

    @property
    def is_one_shot(self) -> bool:
        return self.kind is Kind.FUSE and self.fuse_ctas == 0

    def _check_ctas(self, name: str, least: int, *, is_used: bool) -> None:
        value = getattr(self, name)
        checks.integer(name, value, least if is_used else 0, 1024 if is_used else 0)
        if value % 2:
            raise ValueError(f"{name}: got {value}; expected an even number")


OFF = Candidate(Kind.OFF)


@dataclass(frozen=True)
class Measurement:
    """What a candidate took.

    Raises:
        ValueError: naming the field, what came and what is allowed.
    """

    candidate: Candidate
    us: float  # median of the rounds, slowest rank
    spread_us: float  # half of the range that holds the middle half of the rounds
    rounds: int  # in which it ran; fewer than OFF's: it was dropped on the way

    def __post_init__(self) -> None:
        checks.integer("rounds", self.rounds, 1, MOST_TOKENS)
        checks.time("us", self.us)
        if self.us == 0:
            raise ValueError("us: got 0; expected more than that")
        checks.time("spread_us", self.spread_us)

    @classmethod
    def of(cls, candidate: Candidate, times_us: Sequence[float]) -> "Measurement":
        """Summarise the times of all rounds, to a tenth of a microsecond."""
        low, median, high = (
            statistics.quantiles(times_us, n=4, method="inclusive")
            if len(times_us) > 1
            else 3 * [times_us[0]]
        )
        us = max(round(median, 1), 0.1)
        return cls(candidate, us, round((high - low) / 2, 1), len(times_us))


@dataclass(frozen=True)
class Bucket:
    """What was measured for batches of one mode and size.

    Raises:
        ValueError: naming the field, what came and what is allowed.
    """

    mode: Mode
    tokens: int
    chosen: Candidate
    measured: tuple[Measurement, ...]

    def __post_init__(self) -> None:
        if self.mode not in (Mode.PREFILL, Mode.DECODE):
            raise ValueError(f"mode: got {self.mode!r}; expected one of prefill, decode")
        checks.integer("tokens", self.tokens, 1, MOST_TOKENS)
        candidates = [measurement.candidate for measurement in self.measured]
        for index, candidate in enumerate(candidates):
            if candidate in candidates[:index]:
                raise ValueError(f"measured: {index} repeats an earlier candidate; remove one")
            if candidate.kind is Kind.WEAVE and self.tokens < 2:
                raise ValueError(f"measured: {index} weaves one token, which cannot be cut")
            if candidate.is_one_shot and self.tokens > MOST_ONE_SHOT_TOKENS:
                raise ValueError(
                    f"measured: {index} has no CTAs, which is the one-shot op; it takes at most "
                    f"{MOST_ONE_SHOT_TOKENS} tokens"
                )
        if OFF not in candidates:
            raise ValueError("measured: kind off is missing; without it nothing can be compared")
        if self.chosen not in candidates:
            raise ValueError(f"chosen: {self.chosen} was not measured; choose one that was")

    def time_of(self, candidate: Candidate) -> Measurement:
        """Return the measurement of a candidate that was measured."""
        return next(each for each in self.measured if each.candidate == candidate)

    @property
    def is_edited(self) -> bool:
        """Whether a person chose, and otherwise than the rule does."""
        return self.chosen != choose(self.measured)


@dataclass(frozen=True)
class Table:
    """All buckets that were measured on one machine.

    Raises:
        ValueError: two buckets are of the same mode and size, the CTAs leave too few SMs, or
            there are no CTAs and this transport has no copy engines.
    """

    key: Key
    measured_at: str  # UTC, as 2026-11-24T15:00:00Z
    buckets: tuple[Bucket, ...]  # given in any order, kept by mode (prefill first) and size

    def __post_init__(self) -> None:
        checks.name("measured_at", self.measured_at)
        ordered = sorted(self.buckets, key=lambda each: (each.mode is Mode.DECODE, each.tokens))
        object.__setattr__(self, "buckets", tuple(ordered))
        seen = set()
        for bucket in self.buckets:
            if (bucket.mode, bucket.tokens) in seen:
                raise ValueError(f"buckets: two of mode {bucket.mode} and {bucket.tokens} tokens")
            seen.add((bucket.mode, bucket.tokens))
            candidates = [measurement.candidate for measurement in bucket.measured]
            if self.key.transport != "peer" and any(c.needs_copy_engines for c in candidates):
                raise ValueError(
                    f"buckets: ctas is 0 and transport {self.key.transport!r}; the copy engines "
                    "serve the transport peer only"
                )
            most = max(candidate.ctas for candidate in candidates)
            if self.key.sms - most < LEAST_SMS:
                raise ValueError(
                    f"buckets: {most} CTAs of {self.key.sms} SMs leave fewer than {LEAST_SMS} to "
                    "the computation"
                )

    def of_mode(self, mode: Mode) -> list[Bucket]:
        """Return the buckets of a mode, smallest first; a mixed batch runs as a prefill."""
        wanted = Mode.DECODE if mode is Mode.DECODE else Mode.PREFILL
        return [bucket for bucket in self.buckets if bucket.mode is wanted]


def choose(measured: Sequence[Measurement]) -> Candidate:
    """Return the fastest candidate that beat OFF by more than the noise, or OFF.

    Only those count that ran in as many rounds as OFF, and OFF in five at least.
    """
    off = next(each for each in measured if each.candidate == OFF)
    rivals = [each for each in measured if each.rounds >= max(off.rounds, LEAST_ROUNDS)]
    winners = [each for each in rivals if off.us - each.us > noise_us(off, each)]
    return min(winners, key=lambda each: each.us).candidate if winners else OFF


def noise_us(off: Measurement, other: Measurement) -> float:
    """Return by how much `other` must beat OFF to count as faster.

    That is 1.5 % of OFF's time, or 2.3 standard errors of the difference of the two medians, if
    that is more. With a normal error that is what both spreads are together after nine rounds; so
    a candidate that gains nothing passes two or three times in a hundred, the spreads being
    estimates themselves. Then it does no harm.
    """
    standard_errors = (off.spread_us + other.spread_us) * math.sqrt(9 / off.rounds)
    return max(NOISE * off.us, standard_errors)
