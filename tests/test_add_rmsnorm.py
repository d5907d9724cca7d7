"""The copy engines' kernels: compiled for every GPU, and run on a CPU against float64."""

import struct
import subprocess
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from compiling import check_layout
from host_build import build_host

from sglang_tokenweave import add_rmsnorm, stream_flags
from sglang_tokenweave.add_rmsnorm import Variant, choose_variant
from sglang_tokenweave.compiler import compile_kernel
from sglang_tokenweave.kernels import FP8

DTYPES = {"Bf16": torch.bfloat16, "Fp16": torch.float16}
# Half of the last digit's place, relative at most, and where a type has no normal numbers.
HALF_ULP = {"Bf16": (2.0**-8, 2.0**-134), "Fp16": (2.0**-11, 2.0**-25), "Fp8": (2.0**-4, 2.0**-10)}
ARCHITECTURES = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")
SHAPES = [
    (torch.bfloat16, torch.bfloat16, 2, 8192),
    (torch.float16, torch.float16, 2, 8),
    (torch.bfloat16, torch.bfloat16, 4, 4096),
    (torch.bfloat16, FP8, 6, 5120),
    (torch.float16, FP8, 8, 7168),
    (torch.bfloat16, torch.bfloat16, 8, 16384),
    (torch.bfloat16, FP8, 8, 16384),
]
# One warp, and two: only the latter exchange what they have by shared memory.
HOSTED = [
    *(Variant(e, False, ranks, 1, 32) for e in ("Bf16", "Fp16") for ranks in (2, 3, 4, 6, 8)),
    *(Variant(e, True, ranks, 2, 64) for e in ("Bf16", "Fp16") for ranks in (2, 8)),
    Variant("Bf16", False, 4, 2, 64),
    choose_variant(torch.bfloat16, torch.bfloat16, 2, 5120),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_variants_spill_nothing(shape, tmp_path):
    variant = choose_variant(*shape)
    assert variant.num_vecs * variant.num_threads * 8 >= shape[3]
    compiled = compile_kernel("add_rmsnorm.cu", variant.expression, "sm_90a", cache=tmp_path)
    assert compiled.resources.spill_stores_bytes == compiled.resources.spill_loads_bytes == 0
    # Two rows on an SM at least: one waits for memory while the other adds.
    assert compiled.resources.registers * variant.num_threads <= 65536 // 2 or shape[3] > 8192


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_for_every_architecture(arch, tmp_path):
    variant = choose_variant(torch.bfloat16, FP8, 8, 16384)
    for file, expression in (
        ("add_rmsnorm.cu", variant.expression),
        ("exchange_flags.cu", "exchange_flags<32>"),
    ):
        compiled = compile_kernel(file, expression, arch, cache=tmp_path)
        assert compiled.resources.spill_stores_bytes == compiled.resources.spill_loads_bytes == 0


@pytest.mark.parametrize(
    ("file", "params"),
    [("add_rmsnorm.cu", add_rmsnorm.Params), ("exchange_flags.cu", stream_flags.Params)],
)
def test_params_are_laid_out_as_on_the_device(file, params, tmp_path):
    check_layout(file, params, tmp_path)


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((torch.float32, torch.float32, 2, 8192), "dtype torch.float32"),
        ((torch.bfloat16, torch.float16, 2, 8192), "result is to be torch.float16"),
        ((torch.bfloat16, torch.bfloat16, 1, 8192), "1 ranks"),
        ((torch.bfloat16, torch.bfloat16, 9, 8192), "9 ranks"),
        ((torch.bfloat16, torch.bfloat16, 2, 8196), "8196"),
        ((torch.bfloat16, torch.bfloat16, 2, 0), "hidden_size 0"),
        ((torch.bfloat16, torch.bfloat16, 2, 16392), "16392"),
    ],
)
def test_other_shapes_are_refused_by_name(shape, named):
    with pytest.raises(ValueError, match=named):
        choose_variant(*shape)


@dataclass(frozen=True)
class Case:
    """Launches of one variant on the rows of one rank."""

    variant: Variant
    hidden: int
    num_rows: int
    rank: int = 0
    has_residual: bool = True
    is_in_place: bool = False
    is_watched: bool = False
    num_launches: int = 1
    weight_offset: float = 0.0
    eps: float = 1e-5
    seed: int = 0

    def header(self) -> bytes:
        """Return `Case` of tests/host/add_rmsnorm.cpp."""
        numbers = (
            HOSTED.index(self.variant),
            self.rank,
            self.num_rows,
            self.hidden,
            self.has_residual,
            self.is_in_place,
            self.is_watched,
            self.num_launches,
            self.seed,
        )
        return struct.pack("<9I2f", *numbers, self.eps, self.weight_offset)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return weight, partial rows by rank, residual; one row more than the kernel may touch."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (
            (self.hidden,),
            (self.variant.num_ranks, self.num_rows + 1, self.hidden),
            (self.num_rows + 1, self.hidden),
        )
        weight, parts, residual = (torch.randn(shape, generator=generator) for shape in shapes)
        # In some columns large parts of two ranks cancel: there, the order of additions shows.
        parts[..., ::16] *= 2.0**-10
        parts[0, :, ::16] *= 2.0**18
        parts[1, :, ::16] = -parts[0, :, ::16]
        dtype = DTYPES[self.variant.element]
        return weight.to(dtype), parts.to(dtype), residual.to(dtype)


@dataclass(frozen=True)
class Found:
    """What a case left."""

    parts: torch.Tensor
    residual: torch.Tensor
    scales: torch.Tensor
    count: int
    watched: tuple[int, int]
    out: torch.Tensor


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    lines = (f"{{{v.expression}, {v.num_threads}, {v.num_ranks}, {v.is_fp8:d}}},\n" for v in HOSTED)
    return build_host(tmp_path_factory.mktemp("host"), "add_rmsnorm.cpp", lines)


def run(program, case, weight, parts, residual):
    buffers = (weight, parts, residual)
    stdin = case.header() + b"".join(
        buffer.view(torch.int16).numpy().tobytes() for buffer in buffers
    )
    done = subprocess.run([program], input=stdin, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    data = bytearray(done.stdout)

    def take(shape, dtype):
        num_bytes = dtype.itemsize * int(np.prod(shape))
        taken = torch.frombuffer(data[:num_bytes], dtype=dtype).reshape(shape)
        del data[:num_bytes]
        return taken

    found = Found(
        parts=take(parts.shape, parts.dtype),
        residual=take(residual.shape, residual.dtype),
        scales=take((case.num_rows + 1,), torch.float32),
        count=take((1,), torch.int32).item(),
        watched=tuple(take((2,), torch.int32).tolist()),
        out=take(residual.shape, FP8 if case.variant.is_fp8 else residual.dtype),
    )
    assert not data
    return found


def same_bits(a, b):
    integers = torch.int8 if a.dtype.itemsize == 1 else torch.int16
    return torch.equal(a.view(integers), b.view(integers))


def check(program, case):
    weight, parts, residual = case.inputs()
    found = run(program, case, weight, parts, residual)
    rows = slice(case.num_rows)
    addends = [*parts[:, rows], *([residual[rows]] if case.has_residual else [])]
    total = torch.zeros(case.num_rows, case.hidden)
    for addend in addends:
        total = total + addend.float()  # rank 0 first, the residual last: to the last bit
    expected_residual = residual.clone()
    if case.has_residual:
        expected_residual[rows] = total.to(residual.dtype)
    assert same_bits(found.residual, expected_residual)

    out = found.parts[case.rank] if case.is_in_place else found.out
    if case.num_rows:
        check_rows(case, addends, weight, out[rows], found.scales[rows])
    written = 0 if case.is_in_place else case.num_rows
    assert (found.out[written:].view(torch.int8) == -1).all()
    untouched = [rank for rank in range(len(parts)) if not (case.is_in_place and rank == case.rank)]
    assert same_bits(found.parts[untouched], parts[untouched])
    assert same_bits(found.parts[:, case.num_rows :], parts[:, case.num_rows :])
    assert found.scales[case.num_rows] == -1
    return found


def check_rows(case, addends, weight, out, scales):
    """Compare with float64.

    The tolerance: one rounding to the output; those of float32 in the sum, at most 9, each relative
    to the sum of magnitudes; what they do to the scale; some 40 relative to the result (squares by
    thread and warp; root; products; the quantiser's division).
    """
    exact = sum(addend.double() for addend in addends)
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + case.eps)
    gain = case.weight_offset + weight.double()
    expected = exact * scale * gain
    sum_error = 9 * 2.0**-24 * sum(addend.double().abs() for addend in addends)
    scale_error = scale**2 * (exact.abs() * sum_error).mean(-1, keepdim=True)
    error = sum_error * scale * gain.abs() + expected.abs() * (scale_error + 40 * 2.0**-24)
    found = out.double()
    relative, least = HALF_ULP["Fp8" if case.variant.is_fp8 else case.variant.element]
    if case.variant.is_fp8:
        largest = expected.abs().amax(-1)
        torch.testing.assert_close(scales.double(), largest / 448, rtol=1e-4, atol=0)
        found, least = found * scales.double()[:, None], least * scales.double()[:, None]
    tolerance = error + torch.clamp(relative * expected.abs(), min=least)
    worst = ((found - expected).abs() / tolerance).max()
    assert worst <= 1, f"{worst} of the tolerance"


@pytest.mark.parametrize("variant", HOSTED, ids=lambda v: v.expression)
@pytest.mark.parametrize("is_narrow", [True, False])
def test_agrees_with_float64(program, variant, is_narrow):
    most = variant.num_vecs * variant.num_threads * 8
    hidden = 8 if is_narrow else most - 8 * (variant.num_threads == 64)
    can_be_in_place = not variant.is_fp8
    for seed in range(3):
        case = Case(
            variant,
            hidden,
            num_rows=1 + 3 * seed,
            rank=seed % variant.num_ranks,
            has_residual=seed != 1,
            is_in_place=can_be_in_place and seed != 2,
            weight_offset=float(seed == 2),
            seed=seed,
        )
        check(program, case)


def test_quantises_rows_of_tiny_values(program):
    variant = next(v for v in HOSTED if v.is_fp8)
    case = Case(variant, 64, 3, eps=1e-30)
    weight, parts, residual = (torch.zeros_like(tensor) for tensor in case.inputs())
    found = run(program, case, weight, parts, residual)
    assert not found.out[:3].float().any()
    assert not found.scales[:3].any()


@pytest.mark.parametrize("is_watched", [True, False])
@pytest.mark.parametrize("num_rows", [0, 2])
def test_counts_its_ops_for_a_watcher(program, is_watched, num_rows):
    case = Case(HOSTED[0], 64, num_rows, is_watched=is_watched, num_launches=4, has_residual=False)
    found = check(program, case)
    assert found.count == 2
    assert found.watched == ((2, 2) if is_watched else (0, 0))
