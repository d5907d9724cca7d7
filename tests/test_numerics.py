"""The steps of numerics.py, shortened, and what becomes of extreme values."""

import numerics
import pytest
import torch
from distributed import run_ranks
from numerics import EPS, HIDDEN, Step
from test_kernel_on_cpu import DTYPES, WIDE, Case

from sglang_tokenweave.reference import ReferenceTransport

# One warp, and two groups of two.
VARIANTS = [numerics.HOSTED[0], WIDE[0]]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return numerics.build_kernel(tmp_path_factory.mktemp("kernel"))


def test_reference_over_many_steps() -> None:
    assert numerics.run_reference(600) <= 1


def test_kernel_over_many_steps(host) -> None:
    numerics.run_kernel(host, 250)


def test_the_bound_is_one_that_a_wrong_result_exceeds() -> None:
    step = numerics.draw(0)
    assert isinstance(step, Step)
    total = step.partials.float().sum(0) + step.residual.float()
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
    out = (total * scale * step.weight.float()).to(step.weight.dtype)
    everything = slice(0, len(total))
    assert numerics.error(step, everything, out, total.to(out.dtype)) <= 1
    assert numerics.error(step, everything, out * 1.001, total.to(out.dtype)) > 1
    assert numerics.error(step, everything, out, (total * 1.001).to(out.dtype)) > 1


def _specials_on_rank(rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    transport = ReferenceTransport.create(torch.device("cpu"))
    partials = numerics.special_rows(dtype)
    slot = transport.allocate(16, HIDDEN, dtype).slot(0, partials.shape[1])
    slot.tensor.copy_(partials[rank])
    shard = torch.zeros_like(slot.tensor[slot.owned_rows(rank, 2)])
    weight = torch.full((HIDDEN,), 0.5, dtype=dtype)
    transport.allreduce_rmsnorm(slot, shard, weight, EPS, ctas=2, beside=True).wait()
    transport.close()
    return slot.tensor, shard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_values_leave_the_reference_as_they_leave_stock(dtype) -> None:
    ranks = run_ranks(_specials_on_rank, 2, dtype)
    weight = torch.full((HIDDEN,), 0.5, dtype=dtype)
    wanted, total = numerics.expected_specials(numerics.special_rows(dtype), weight)
    assert same(ranks[0][0], ranks[1][0])
    assert same(ranks[0][0], wanted)
    assert same(torch.cat([ranks[0][1], ranks[1][1]]), total)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether all are equal, and NaN where the other is: of which there are many."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and bool(((a == b) | a.isnan()).all())
    )


def run_specials(host, gain: float):
    """Return what the kernel makes of the special rows on rank 0 and 1, and what stock does."""
    variant = numerics.HOSTED[0]
    dtype = DTYPES[variant.element]
    partials = numerics.special_rows(dtype)
    num_rows = partials.shape[1]
    case = Case(variant, HIDDEN, (num_rows,))
    weight = torch.full((HIDDEN,), gain, dtype=dtype)
    x = torch.zeros(1, 2, case.capacity, HIDDEN, dtype=dtype)
    x[0, :, :num_rows] = partials
    residual = torch.zeros(1, 2, case.owned_capacity, HIDDEN, dtype=dtype)
    buffers = [each.view(torch.uint16).numpy() for each in (weight, x, residual)]
    done = host.run(case, *buffers)
    assert done.returncode == 0, done.stderr.decode()
    found = torch.frombuffer(bytearray(done.stdout[: x.nbytes]), dtype=dtype).view(x.shape)
    return found[0, :, :num_rows], numerics.expected_specials(partials, weight)[0]


def test_extreme_values_leave_the_kernel_as_they_leave_stock(host) -> None:
    ranks, wanted = run_specials(host, gain=0.5)
    assert same(ranks[0], ranks[1])
    assert torch.equal(ranks[0].isnan(), wanted.isnan())
    assert ranks[0][2].isfinite().all()
    near = torch.isclose(ranks[0].double(), wanted.double(), rtol=2.0**-7, atol=0, equal_nan=True)
    assert near.all()


def test_only_a_product_beyond_float32_differs_from_stock(host) -> None:
    """The kernel multiplies by the weight before it scales, stock after: see docs/limits.md."""
    ranks, wanted = run_specials(host, gain=4.0)
    differs = ranks[0].isnan() != wanted.isnan()
    assert differs[0].all()
    assert not differs[1:].any()
    assert not wanted[0].any(), "stock's row is lost, too"
