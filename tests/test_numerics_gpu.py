"""The fused kernel over many steps with fresh data, and extreme values, on one GPU."""

import itertools
import random
from dataclasses import dataclass

import numerics
import pytest
import torch
from test_fused_gpu import EPS, TOLERANCES, expected, relative_error

from sglang_tokenweave.emulation import EmulatedRanks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_STEPS = 10_000
CHECK_EVERY = 250  # steps, with float64
# (rows, CTAs): a row for one rank only, uneven shares, one row a block, several.
GRIDS = [(1, 2), (13, 4), (32, 8), (96, 6)]


@dataclass
class Op:
    """One size of the op on all ranks: inputs at fixed places, eager launches, and a graph."""

    ranks: EmulatedRanks
    shards: list[torch.Tensor]  # of the residual, by rank
    weight: torch.Tensor
    rows: int
    ctas: int
    graph: torch.cuda.CUDAGraph | None = None

    def load(self, partials: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        """Put the inputs in place, and NaN into the rows behind."""
        self.weight.copy_(weight)
        for rank, part in enumerate(partials):
            self.ranks.x[rank].fill_(torch.nan)
            self.ranks.x[rank][: self.rows].copy_(part)
            self.shards[rank].copy_(residual[self.owned(rank)])

    def owned(self, rank: int) -> slice:
        return self.slot(rank).owned_rows(rank, self.ranks.world_size)

    def slot(self, rank: int):
        return self.ranks.rows(rank, self.ranks.x, 0, self.rows).slot

    def launch(self) -> None:
        """Launch on all ranks' streams, behind the caller's and before what it does next."""
        self.ranks.fork()
        for rank, shard in enumerate(self.shards):
            x = self.ranks.rows(rank, self.ranks.x, 0, self.rows)
            self.ranks.launch(rank, x, x, shard, self.weight, EPS, 0.0, ctas=self.ctas)
        self.ranks.join()

    def capture(self) -> None:
        """Capture a launch, for `replay`."""
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.launch()

    def replay(self) -> None:
        """Do what `launch` does."""
        assert self.graph is not None
        self.graph.replay()

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies: all ranks' rows, `[ranks, rows, hidden]`, and the whole residual."""
        return torch.stack([x[: self.rows] for x in self.ranks.x]), torch.cat(self.shards)


def make_op(ranks: EmulatedRanks, rows: int, ctas: int) -> Op:
    dtype, hidden = ranks.x[0].dtype, ranks.x[0].shape[1]
    op = Op(ranks, [], torch.empty(hidden, dtype=dtype, device="cuda"), rows, ctas)
    for rank in range(ranks.world_size):
        op.shards.append(torch.empty_like(op.slot(rank).tensor[op.owned(rank)]))
    return op


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16)


def count_steps_with_other_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return 1 if any bit differs, else 0, on the GPU: a look at it would wait for the GPU."""
    return (bits(a) != bits(b)).any().to(torch.int64)


@pytest.mark.parametrize(
    ("world_size", "hidden", "dtype"), [(2, 8192, torch.bfloat16), (8, 4096, torch.float16)]
)
def test_ten_thousand_steps_with_fresh_data(world_size, hidden, dtype) -> None:
    ranks = EmulatedRanks(world_size, max(rows for rows, _ in GRIDS) + 2, hidden, dtype)
    ops = [make_op(ranks, *grid) for grid in GRIDS]
    generator = torch.Generator("cuda").manual_seed(0)
    magnitudes = random.Random(0)

    def draw(rows: int) -> list[torch.Tensor]:
        shapes = (world_size, rows, hidden), (rows, hidden), (hidden,)
        factors = (10.0 ** magnitudes.uniform(-2, 2),) * 2 + (1.0,)
        return [
            (torch.randn(shape, generator=generator, device="cuda") * factor).to(dtype)
            for shape, factor in zip(shapes, factors, strict=True)
        ]

    for op in ops:
        op.load(*draw(op.rows))
        op.launch()
        op.capture()
    across_ranks, across_modes = torch.zeros(2, dtype=torch.int64, device="cuda")
    for step, op in zip(range(NUM_STEPS), itertools.cycle(ops), strict=False):
        inputs = draw(op.rows)
        op.load(*inputs)
        op.launch()
        out, total = op.results()
        op.load(*inputs)
        op.replay()
        again, total_again = op.results()
        across_ranks += count_steps_with_other_bits(out, out[:1])
        across_modes += count_steps_with_other_bits(out, again)
        across_modes += count_steps_with_other_bits(total, total_again)
        # An odd number, so that every size has its turn.
        if step % (CHECK_EVERY + 1) == 0:
            wanted, sums = expected(*inputs)
            assert relative_error(out[0], wanted) < TOLERANCES[dtype], f"step {step}"
            assert relative_error(total, sums) < TOLERANCES[dtype], f"step {step}"
    assert (across_ranks.item(), across_modes.item()) == (0, 0)
    assert all(bool(x[op.rows :].isnan().all()) for x in ranks.x)


def test_the_count_sees_one_bit() -> None:
    values = torch.zeros(4, 8, dtype=torch.bfloat16, device="cuda")
    assert count_steps_with_other_bits(values, values).item() == 0
    other = values.clone()
    other[3, 7] = -0.0
    assert count_steps_with_other_bits(values, other).item() == 1


@pytest.mark.parametrize("is_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_values_leave_the_kernel_as_they_leave_torch(dtype, is_graph) -> None:
    partials = numerics.special_rows(dtype).cuda()
    rows, hidden = partials.shape[1:]
    op = make_op(EmulatedRanks(2, rows, hidden, dtype), rows, ctas=4)
    residual = torch.zeros_like(partials[0])
    weight = torch.full((hidden,), 0.5, dtype=dtype, device="cuda")
    op.load(partials, residual, weight)
    if is_graph:
        op.capture()
        op.replay()
    else:
        op.launch()
    out, total = op.results()
    wanted, sums = numerics.expected_specials(partials, weight)
    assert torch.equal(bits(out[0]), bits(out[1]))
    for found, right in ((out[0], wanted), (total, sums)):
        assert torch.equal(found.isnan(), right.isnan())
        # Two units in the last place: the root of a GPU is not rounded as torch's.
        precision = torch.finfo(dtype).eps
        close = torch.isclose(
            found.double(), right.double(), rtol=2 * precision, atol=0, equal_nan=True
        )
        assert close.all(), (found[~close], right[~close])
