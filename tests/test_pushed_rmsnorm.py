"""The kernels that push rows: compiled for every GPU, and run on a CPU against float64."""

import struct
import subprocess
from dataclasses import dataclass

import ptx
import pytest
import torch
from compiling import check_layout
from host_build import build_host
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tokenweave.compiler import compile_kernel
from sglang_tokenweave.pushed_rmsnorm import EMPTY, Exchange, Params, Variant, choose_variant

DTYPES = {"Bf16": torch.bfloat16, "Fp16": torch.float16}
# Half of the last digit's place, relative at most, and where a type has no normal numbers.
HALF_ULP = {"Bf16": (2.0**-8, 2.0**-134), "Fp16": (2.0**-11, 2.0**-25)}
ARCHITECTURES = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")
ONE_SHOT, TWO_SHOT = Exchange
SHAPES = [
    (exchange, *shape)
    for exchange in Exchange
    for shape in (
        (torch.bfloat16, 2, 8192),
        (torch.bfloat16, 8, 16384),
        (torch.float16, 3, 8),
        (torch.bfloat16, 4, 5120),
    )
]
HOSTED = [
    Variant(exchange, *arguments)
    for exchange in Exchange
    for arguments in (
        *((element, ranks, 1, 32) for element in DTYPES for ranks in (2, 3, 4, 8)),
        ("Bf16", 2, 2, 64),
        ("Fp16", 4, 2, 64),
        ("Bf16", 8, 3, 32),
    )
]
NOBODY = 99


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_variants_hold_a_row_and_spill_nothing(shape, tmp_path):
    variant = choose_variant(*shape)
    assert variant.num_vecs * variant.num_threads * 8 >= shape[-1]
    assert variant.num_threads <= 1024
    source = f"{variant.exchange.value}.cu"
    compiled = compile_kernel(source, variant.expression, "sm_90a", cache=tmp_path)
    assert compiled.resources.spill_stores_bytes == compiled.resources.spill_loads_bytes == 0
    assert compiled.resources.registers * variant.num_threads <= 65536
    assert compiled.resources.stack_bytes <= 32  # what printf is given: no array is in memory


@pytest.mark.parametrize("exchange", Exchange)
def test_a_launch_that_starts_early_reads_nothing_before_the_kernel_before_it_has_ended(
    exchange, tmp_path
):
    variant = choose_variant(exchange, torch.bfloat16, 2, 8192)
    source = f"{exchange.value}.cu"
    compiled = compile_kernel(source, variant.expression, "sm_90a", cache=tmp_path)
    before, between = ptx.early_start(compiled.ptx)
    assert not ptx.global_accesses(before)
    assert "st.relaxed.sys.global" in between


@pytest.mark.parametrize("exchange", Exchange)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_compiles_for_every_architecture(arch, exchange, tmp_path):
    variant = choose_variant(exchange, torch.bfloat16, 8, 8192)
    source = f"{exchange.value}.cu"
    compiled = compile_kernel(source, variant.expression, arch, cache=tmp_path)
    assert compiled.resources.spill_stores_bytes == 0


def test_params_are_laid_out_as_on_the_device(tmp_path):
    check_layout("pushed_rows.cuh", Params, tmp_path)


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((torch.float32, 2, 8192), "dtype torch.float32"),
        ((torch.bfloat16, 1, 8192), "1 ranks"),
        ((torch.bfloat16, 9, 8192), "9 ranks"),
        ((torch.bfloat16, 2, 8196), "8196"),
        ((torch.bfloat16, 2, 0), "hidden_size 0"),
        ((torch.bfloat16, 2, 16392), "16392"),
    ],
)
def test_other_shapes_are_refused_by_name(shape, named):
    with pytest.raises(ValueError, match=named):
        choose_variant(ONE_SHOT, *shape)


@dataclass(frozen=True)
class Case:
    """Launches one after another of one variant on all ranks."""

    variant: Variant
    hidden: int
    num_rows: tuple[int, ...]
    at_once: int = 2  # blocks that run side by side
    has_residual: bool = True
    is_in_place: bool = False
    late_rank: int = NOBODY
    dead_rank: int = NOBODY
    dead_from: int = 0
    deadline_ms: int = 20_000
    weight_offset: float = 0.0
    eps: float = 1e-5
    seed: int = 0

    @property
    def capacity(self) -> int:
        return max(self.num_rows)

    def header(self) -> bytes:
        """Return `Case` of tests/host/pushed_rmsnorm.cpp, and the rows of each launch."""
        return struct.pack(
            f"<12I2f{len(self.num_rows)}I",
            HOSTED.index(self.variant),
            len(self.num_rows),
            self.at_once,
            self.capacity,
            self.hidden,
            self.has_residual,
            self.is_in_place,
            self.late_rank,
            self.dead_rank,
            self.dead_from,
            self.deadline_ms,
            self.seed,
            self.eps,
            self.weight_offset,
            *self.num_rows,
        )

    def inputs(self):
        """Return weight, x and residual; `[launch, rank, row, hidden]`, the residual alike."""
        generator = torch.Generator().manual_seed(self.seed)
        ranks = self.variant.num_ranks
        shape = (len(self.num_rows), ranks, self.capacity, self.hidden)
        weight = torch.randn(self.hidden, generator=generator)
        x = torch.randn(shape, generator=generator)
        x[..., ::5] = -0.0  # what staging holds while it is empty
        x[..., 1::5] = 0.0
        residual = torch.randn(shape[0], 1, *shape[2:], generator=generator).expand(shape)
        return (
            each.to(DTYPES[self.variant.element]).contiguous() for each in (weight, x, residual)
        )


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    lines = (
        f"{{{v.expression}, {v.num_threads}, {v.num_ranks}, "
        f"{str(v.exchange is TWO_SHOT).lower()}}},\n"
        for v in HOSTED
    )
    return build_host(tmp_path_factory.mktemp("host"), "pushed_rmsnorm.cpp", lines)


def run(program, case, weight, x, residual):
    stdin = case.header() + b"".join(
        buffer.view(torch.int16).numpy().tobytes() for buffer in (weight, x, residual)
    )
    return subprocess.run([program], input=stdin, capture_output=True, timeout=120, check=False)


def check(program, case):
    weight, x, residual = case.inputs()
    done = run(program, case, weight, x, residual)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found = torch.frombuffer(bytearray(done.stdout), dtype=x.dtype).reshape(3, *x.shape)
    out = found[0] if case.is_in_place else found[2]
    for launch, rows in enumerate(case.num_rows):
        addends = [*x[launch, :, :rows]]
        addends += [residual[launch, 0, :rows]] if case.has_residual else []
        total = torch.zeros(rows, case.hidden)
        for addend in addends:
            total = total + addend.float()  # rank 0 first, the residual last: to the last bit
        for rank in range(case.variant.num_ranks):
            owned = case.variant.exchange.owned(rows, rank, case.variant.num_ranks)
            kept = residual[launch, rank].clone()
            if case.has_residual:
                kept[owned] = total.to(x.dtype)[owned]
            assert torch.equal(found[1, launch, rank], kept)
            assert same_bits(out[launch, rank, :rows], out[launch, 0, :rows])
        check_rows(case, addends, weight, out[launch, 0, :rows])


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def check_rows(case, addends, weight, out):
    """Compare with float64; the tolerance is that of tests/test_add_rmsnorm.py."""
    exact = sum(addend.double() for addend in addends)
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + case.eps)
    gain = case.weight_offset + weight.double()
    expected = exact * scale * gain
    sum_error = 9 * 2.0**-24 * sum(addend.double().abs() for addend in addends)
    scale_error = scale**2 * (exact.abs() * sum_error).mean(-1, keepdim=True)
    error = sum_error * scale * gain.abs() + expected.abs() * (scale_error + 40 * 2.0**-24)
    relative, least = HALF_ULP[case.variant.element]
    tolerance = error + torch.clamp(relative * expected.abs(), min=least)
    worst = ((out.double() - expected).abs() / tolerance).max()
    assert worst <= 1, f"{worst} of the tolerance"


@pytest.mark.parametrize("variant", HOSTED, ids=lambda v: v.expression)
def test_agrees_with_float64_over_launches_of_other_sizes(program, variant):
    """More launches than parts of the staging, so that each part is emptied and used again."""
    most = variant.num_vecs * variant.num_threads * 8
    for seed, hidden in enumerate((8, most - 8 * (variant.num_threads == 64), most)):
        check(
            program,
            Case(
                variant,
                hidden,
                num_rows=(3, 1, 7, 2, 5, 1, 1, 6),
                has_residual=seed != 1,
                is_in_place=seed == 2,
                weight_offset=float(seed == 1),
                late_rank=seed,
                seed=seed,
            ),
        )


@settings(deadline=None, max_examples=20)
@given(
    num_rows=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    at_once=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_blocks_need_not_run_side_by_side(program, num_rows, at_once, seed):
    for exchange in Exchange:
        variant = Variant(exchange, "Bf16", 3, 1, 32)
        case = Case(variant, 64, tuple(num_rows), at_once, seed=seed, late_rank=seed % 3)
        check(program, case)


@pytest.mark.parametrize("exchange", Exchange)
def test_a_rank_that_does_not_come_is_named_after_the_deadline(program, exchange):
    variant = Variant(exchange, "Bf16", 2, 1, 32)
    case = Case(variant, 64, (2, 2, 2), dead_rank=1, dead_from=1, deadline_ms=300)
    done = run(program, case, *case.inputs())
    assert done.returncode == 1
    assert b"rank 0, CTA 0 waited 300 ms for rows of rank 1" in done.stderr


def test_staging_is_empty_where_it_holds_what_nobody_sends():
    for dtype in DTYPES.values():
        empty = torch.tensor([EMPTY], dtype=torch.int16).view(dtype)
        assert empty.item() == 0
        assert torch.signbit(empty).item()
