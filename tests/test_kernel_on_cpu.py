"""The kernel's own sources on a CPU: results, memory, lateness, death, and data races.

tests/host/ stands in for CUDA and for cuda/ptx.cuh; every other line is the one that a GPU runs.
"""

import shutil
import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from host_build import build_host
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_tokenweave.kernels import Variant, choose_variant

# Bits of a significand, and the exponent of the smallest normal number.
PRECISION = {"Bf16": (8, -126), "Fp16": (11, -14), "E4m3": (4, -6)}
DTYPES = {"Bf16": torch.bfloat16, "Fp16": torch.float16}
LARGEST_E4M3 = 448
NOBODY = 99
TIMEOUT_S = 60
# One warp a group, and two: only the latter exchanges partial sums, by shared memory.
ELEMENTS = tuple(DTYPES)
SMALL = [
    Variant(ELEMENTS[(i + is_multicast) % 2], ranks, 1, 2, 32, 2, is_multicast, is_fp8)
    for i, ranks in enumerate((2, 4, 6, 8))
    for is_multicast, is_fp8 in ((False, False), (True, True))
]
# Fewer pieces in flight than a row has, and more.
WIDE = [
    Variant("Fp16", 2, 2, 2, 64, 7, False, True),
    Variant("Bf16", 4, 2, 2, 64, 1),
    Variant("Bf16", 8, 2, 2, 64, 2, True, False),
]
CHOSEN = [
    choose_variant(torch.bfloat16, 2, 5120),
    choose_variant(torch.float16, 4, 1000, has_one_group=True),
    choose_variant(torch.bfloat16, 8, 4096, is_multicast=True, is_fp8=True),
]
RACED = [Variant("Bf16", 2, 2, 2, 64, 2, *flags) for flags in ((False, True), (True, False))]


@dataclass(frozen=True)
class Case:
    """Launches of one variant on all ranks; launch i is on channel i % num_channels."""

    variant: Variant
    hidden: int
    num_tokens: tuple[int, ...]
    num_ctas: int = 2
    num_channels: int = 1
    has_residual: bool = True
    is_in_place: bool = True
    weight_offset: float = 0.0
    dead_rank: int = NOBODY
    dead_from: int = 0
    late_rank: int = NOBODY
    other_rank: int = NOBODY
    deadline_ms: int = 20_000
    first_epoch: int = 0
    seed: int = 0
    eps: float = 1e-5
    late_ms: int = 20

    @property
    def is_written_in_place(self) -> bool:
        """Return whether the result replaces x."""
        return self.is_in_place and not self.variant.is_fp8

    @property
    def capacity(self) -> int:
        """Return the rows of x: as many as any launch has, and two that nobody may touch."""
        return max(self.num_tokens) + 2

    @property
    def owned_capacity(self) -> int:
        """Return the rows of a rank's residual: as many as it may own, and two as above."""
        return -(-max(self.num_tokens) // self.variant.num_ranks) + 2

    def header(self, variant_idx: int) -> bytes:
        """Return `Case` of tests/host/main.cpp."""
        return struct.pack(
            f"<19I2f{len(self.num_tokens)}I",
            variant_idx,
            self.variant.num_ranks,
            self.num_ctas,
            self.num_channels,
            len(self.num_tokens),
            self.capacity,
            self.owned_capacity,
            self.hidden,
            self.has_residual,
            self.is_written_in_place,
            self.dead_rank,
            self.dead_from,
            self.late_rank,
            self.late_ms,
            self.other_rank,
            2,  # its digest; that of the others is 1
            self.deadline_ms,
            self.first_epoch,
            self.seed,
            self.eps,
            self.weight_offset,
            *self.num_tokens,
        )


@dataclass(frozen=True)
class Host:
    """The built program and the variants in it."""

    command: tuple[str, ...]
    variants: tuple[Variant, ...]

    def run(self, case: Case, *buffers: np.ndarray) -> subprocess.CompletedProcess[bytes]:
        """Run a case; memory is in `stdout`, messages and reports are in `stderr`."""
        stdin = case.header(self.variants.index(case.variant)) + b"".join(
            buffer.tobytes() for buffer in buffers
        )
        return subprocess.run(
            self.command, input=stdin, capture_output=True, timeout=TIMEOUT_S, check=False
        )


def build(folder: Path, variants: list[Variant], *flags: str) -> Host:
    lines = (
        f"{{{v.expression}, {v.num_threads}, {v.shared_bytes}, "
        f"{v.is_multicast:d}, {v.is_fp8:d}}},\n"
        for v in variants
    )
    # The memory that stands for `extern __shared__` has no constructor to run.
    program = build_host(folder, "main.cpp", lines, "-fno-extern-tls-init", *flags)
    return Host((program,), tuple(variants))


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    return build(tmp_path_factory.mktemp("host"), SMALL + WIDE + CHOSEN)


def to_bits(values, element):
    return torch.tensor(values).to(DTYPES[element]).view(torch.uint16).numpy()


def from_bits(bits, element):
    dtype = torch.float8_e4m3fn if element == "E4m3" else DTYPES[element]
    return torch.tensor(bits).view(dtype).to(torch.float32).numpy()


def make_buffers(case):
    """Return the bits of weight, x by launch and rank, and residual by launch and rank."""
    random = np.random.default_rng(case.seed)
    v, launches = case.variant, len(case.num_tokens)
    weight, x, residual = (
        random.standard_normal(shape, np.float32)
        for shape in (
            (case.hidden,),
            (launches, v.num_ranks, case.capacity, case.hidden),
            (launches, v.num_ranks, case.owned_capacity, case.hidden),
        )
    )
    # In some columns large parts of two ranks cancel: there, the order of the additions shows.
    one, other = random.permutation(v.num_ranks)[:2]
    x[..., ::16] *= 2.0**-10
    x[:, one, :, ::16] *= 2.0**18
    x[:, other, :, ::16] = -x[:, one, :, ::16]
    return [to_bits(values, v.element) for values in (weight, x, residual)]


def half_ulp(values, element):
    digits, least = PRECISION[element]
    exponent = np.maximum(np.frexp(values)[1] - 1, least)
    return np.ldexp(0.5, exponent - (digits - 1))


def check_launch(case, num_tokens, weight, before, after):
    """Compare what one launch left with what it should have, and all other rows with its input."""
    v = case.variant
    (x, residual), (x_found, residual_found, out, scales) = before, after
    if case.is_written_in_place:
        out = x_found
    elif v.is_fp8:
        halves = out.view(np.uint8).reshape(v.num_ranks, 2, *x.shape[1:])
        out = halves[:, 0]  # the memory is for rows of two bytes an element
    share = -(-num_tokens // v.num_ranks)
    owned = [
        slice(rank * share, min((rank + 1) * share, num_tokens)) for rank in range(v.num_ranks)
    ]
    num_owned = [max(rows.stop - rows.start, 0) for rows in owned]
    addends = [from_bits(x[rank, :num_tokens], v.element) for rank in range(v.num_ranks)]
    if v.is_multicast:  # the switch rounds what it added
        addends = [from_bits(to_bits(sum_in_order(addends), v.element), v.element)]
    expected = residual.copy()
    if case.has_residual:
        parts = [residual[rank, :rows] for rank, rows in enumerate(num_owned)]
        addends.append(from_bits(np.concatenate(parts), v.element))
        bits = to_bits(sum_in_order(addends), v.element)
        for rank, rows in enumerate(num_owned):
            expected[rank, :rows] = bits[owned[rank]]
    np.testing.assert_array_equal(residual_found, expected)

    rows = slice(0, num_tokens)
    for rank in range(1, v.num_ranks):  # all ranks hold the same bits
        np.testing.assert_array_equal(out[rank, rows], out[0, rows])
        np.testing.assert_array_equal(scales[rank, rows], scales[0, rows])
    found = from_bits(out[0, rows], "E4m3" if v.is_fp8 else v.element)
    check_rows(case, addends, weight, found, scales[0, rows, None] if v.is_fp8 else None)
    if case.is_written_in_place:
        np.testing.assert_array_equal(out[:, num_tokens:], x[:, num_tokens:])
    else:
        np.testing.assert_array_equal(x_found, x)
        assert np.all(out[:, num_tokens:].view(np.uint8) >= 0xC1)  # as they were, a NaN each
    assert np.all(scales[:, num_tokens if v.is_fp8 else 0 :] == -1)


def sum_in_order(addends):
    """Add in float32, rank 0 first and the residual last: the kernel's sum to the last bit."""
    total = np.zeros_like(addends[0])
    for addend in addends:
        total = total + addend
    return total


def check_rows(case, addends, weight, found, unit):
    """Compare normalised rows with float64; `unit` is the scale of FP8 rows, or None.

    The tolerance: one rounding to the element; those of float32 in the sum, at most 9, each
    relative to the sum of magnitudes; what they do to the scale; and some 40 relative to the result
    (squares by thread, warp and group; root; two products). The unit has the same, without the
    first.
    """
    element = case.variant.element
    total = np.sum(addends, axis=0, dtype=np.float64)
    scale = 1 / np.sqrt(np.mean(total**2, axis=1, keepdims=True) + case.eps)
    gain = case.weight_offset + from_bits(weight, element).astype(np.float64)
    expected = total * scale * gain
    sum_error = 9 * 2.0**-24 * np.sum(np.abs(addends), axis=0, dtype=np.float64)
    scale_error = scale**2 * np.mean(np.abs(total) * sum_error, axis=1, keepdims=True)
    tolerance = sum_error * scale * np.abs(gain) + np.abs(expected) * (scale_error + 40 * 2.0**-24)
    if unit is None:
        compare(found, expected, tolerance + half_ulp(expected, element))
        return
    largest = np.max(np.abs(expected), axis=1, keepdims=True)
    compare(unit * LARGEST_E4M3, largest, np.max(tolerance, axis=1, keepdims=True))
    rounding = unit * half_ulp(expected / unit, "E4m3")
    compare(found * unit.astype(np.float64), expected, tolerance + rounding)


def compare(found, expected, tolerance):
    error = np.abs(found - expected)
    assert np.all(error <= tolerance), f"{np.max(error / tolerance)} of the tolerance"


def check(host, case):
    weight, x, residual = make_buffers(case)
    done = host.run(case, weight, x, residual)
    if b"unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer needs a fixed memory layout: allow `setarch -R`")
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    sizes = np.cumsum([x.size, residual.size, x.size]) * 2
    memory = np.split(np.frombuffer(done.stdout, np.uint8), sizes)
    x_found, residual_found, out = (
        part.view(np.uint16).reshape(shape)
        for part, shape in zip(memory, (x.shape, residual.shape, x.shape), strict=False)
    )
    scales = memory[3].view(np.float32).reshape(x.shape[:3])
    before = zip(x, residual, strict=True)
    after = zip(x_found, residual_found, out, scales, strict=True)
    for each in zip(case.num_tokens, before, after, strict=True):
        check_launch(case, each[0], weight, *each[1:])


@st.composite
def cases(draw):
    variant = draw(st.sampled_from(SMALL + WIDE))
    most = variant.num_vecs * variant.group_threads
    return Case(
        variant,
        hidden=8 * draw(st.integers(1, most)),
        num_tokens=tuple(draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))),
        num_ctas=draw(st.integers(1, 3)),
        num_channels=draw(st.integers(1, 2)),
        has_residual=draw(st.booleans()),
        is_in_place=draw(st.booleans()),
        weight_offset=draw(st.sampled_from([0.0, 1.0])),
        late_rank=draw(st.sampled_from([NOBODY, 0, variant.num_ranks - 1])),
        first_epoch=draw(st.sampled_from([0, 2**32 - 3])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(case=cases())
@example(Case(WIDE[0], hidden=1024, num_tokens=(50, 1, 49, 2), num_ctas=1, late_rank=1))
def test_agrees_with_float64(host, case):
    check(host, case)


@pytest.mark.parametrize("variant", CHOSEN, ids=lambda v: v.expression)
def test_variants_that_serve(host, variant):
    hidden = {2: 5120, 4: 1000, 8: 4096}[variant.num_ranks]
    check(host, Case(variant, hidden=hidden, num_tokens=(13, 3), num_ctas=1))


@pytest.mark.parametrize("num_ctas", [1, 2])
@pytest.mark.parametrize("dead_from", [0, 2])
def test_a_dead_rank_is_named_by_all_others(host, dead_from, num_ctas):
    variant = next(v for v in SMALL if v.num_ranks == 4)
    case = Case(
        variant, 64, (5, 6, 7), num_ctas, dead_rank=2, dead_from=dead_from, deadline_ms=1000
    )
    done = host.run(case, *make_buffers(case))
    assert done.returncode == 1
    reports = done.stderr.decode().splitlines()
    assert sorted(reports) == [
        f"tokenweave: rank {rank}, CTA {cta} waited 1000 ms for rank 2: "
        f"epoch {2 * dead_from + 1}, seen {2 * dead_from}"
        for rank in (0, 1, 3)
        for cta in range(num_ctas)
    ]


def test_ranks_with_other_arguments_stop_before_they_touch_anything(host):
    variant = next(v for v in SMALL if v.num_ranks == 4)
    case = Case(variant, 64, (5,), num_ctas=1, other_rank=2, deadline_ms=1000)
    done = host.run(case, *make_buffers(case))
    assert done.returncode == 1
    reports = done.stderr.decode().splitlines()
    # Who sees it first may be gone before the others' second wait: they name it by its silence.
    named = [line for line in reports if "runs the op with other arguments" in line]
    assert {line.partition(", CTA 0: rank ")[2][0] for line in named} >= {"2"}
    assert all("rank 2, CTA 0:" in line or "CTA 0: rank 2 runs" in line for line in named)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    built = build(folder, RACED, "-g", "-fsanitize=thread")
    # ThreadSanitizer's shadow memory does not fit around every randomised layout.
    fixed = ("setarch", "-R")
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], check=False).returncode:
        fixed = ()
    return replace(built, command=(*fixed, *built.command))


@pytest.mark.parametrize("variant", RACED, ids=lambda v: v.expression)
@pytest.mark.parametrize("num_channels", [1, 2])
def test_only_the_barriers_order_the_ranks(sanitized, num_channels, variant):
    """Every access to x, residual, epochs and shared memory is ordered, or there is a report."""
    check(sanitized, Case(variant, 1024, (9, 1, 10, 9), num_channels=num_channels, late_rank=1))
