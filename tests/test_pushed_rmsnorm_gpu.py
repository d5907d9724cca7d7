"""The kernels that push rows, on GPUs: ranks emulated on one, and one on each."""

import pytest
import torch
from distributed import run_ranks
from gpus import COUNT, RANKS
from test_fused_gpu import EPS, TOLERANCES, draw, expected, relative_error

from sglang_tokenweave.emulation import new_stream
from sglang_tokenweave.pushed_rmsnorm import EMPTY, Exchange, PushedGroup, PushedOp

CAPACITY = 128
# More launches than parts of the staging, small ones after large ones.
ROWS = (1, 128, 3, 64, 2, 17, 128, 1)
# Emulated ranks wait for each other on one GPU, so all their blocks, one a row at most, have to run
# at once. Each SM of an H100 or H200 holds at least one.
MOST_BLOCKS = 132
SHAPES = [
    (2, 8192, torch.bfloat16),
    (4, 5120, torch.bfloat16),
    (8, 7168, torch.float16),
    (8, 16384, torch.bfloat16),
    (3, 264, torch.float16),
]
REPLAYS = 300

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_two_gpus = pytest.mark.skipif(COUNT < 2, reason="needs two CUDA devices")


class Ranks:
    """Several ranks on one GPU, each with staging and a stream of its own."""

    def __init__(self, exchange, world_size, hidden, dtype, deadline_s=30.0):
        self.exchange = exchange
        num_bytes = exchange.staging_bytes(CAPACITY, world_size, hidden)
        shape = (num_bytes // 2,)
        self.staging = [
            torch.full(shape, EMPTY, dtype=torch.int16, device="cuda") for _ in range(world_size)
        ]
        self.streams = [new_stream() for _ in range(world_size)]
        self.ops = [
            PushedOp(
                exchange,
                rank,
                torch.device("cuda", torch.cuda.current_device()),
                [each.data_ptr() for each in self.staging],
                capacity=CAPACITY,
                hidden_size=hidden,
                dtype=dtype,
                deadline_s=deadline_s,
            )
            for rank in range(world_size)
        ]

    def owned(self, rows, rank):
        return self.exchange.owned(rows, rank, len(self.ops))

    def launch(self, partials, residuals, weight, outs, offset=0.0):
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())
        for rank, (op, stream) in enumerate(zip(self.ops, self.streams, strict=True)):
            with torch.cuda.stream(stream):
                op.launch(
                    partials[rank],
                    residuals[rank],
                    weight,
                    EPS,
                    out=outs[rank],
                    weight_offset=offset,
                )
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)


exchanges = pytest.mark.parametrize("exchange", Exchange)


@exchanges
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_and_all_ranks_hold_the_same_bits(shape, exchange):
    world_size, hidden, dtype = shape
    ranks = Ranks(exchange, world_size, hidden, dtype)
    for number, most in enumerate(ROWS):
        rows = min(most, MOST_BLOCKS // world_size)
        partials, residual, weight = draw(world_size, rows, hidden, dtype, number)
        partials[..., ::7] = -0.0  # what empty staging holds
        residual = None if number == 3 else residual
        owned = [ranks.owned(rows, rank) for rank in range(world_size)]
        residuals = [None if residual is None else residual[each].clone() for each in owned]
        outs = [torch.full_like(part, float("nan")) for part in partials]
        ranks.launch(list(partials), residuals, weight, outs, offset=float(number % 2))
        torch.cuda.synchronize()
        result, total = expected(partials, residual, weight, float(number % 2))
        for rank in range(world_size):
            assert relative_error(outs[rank], result) <= TOLERANCES[dtype]
            assert torch.equal(outs[rank], outs[0])
            if residual is not None and len(residuals[rank]):
                assert relative_error(residuals[rank], total[owned[rank]]) <= TOLERANCES[dtype]
                assert exchange is Exchange.TWO_SHOT or torch.equal(residuals[rank], residuals[0])


@exchanges
def test_a_graph_is_replayed_with_fresh_data(exchange):
    ranks = Ranks(exchange, 2, 4096, torch.bfloat16)
    partials, residual, weight = draw(2, 32, 4096, torch.bfloat16)
    owned = [ranks.owned(32, rank) for rank in range(2)]
    residuals = [residual[each].clone() for each in owned]
    outs = [torch.empty_like(part) for part in partials]
    ranks.launch(list(partials), residuals, weight, outs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):  # two launches a replay: every turn comes first once
            ranks.launch(list(partials), residuals, weight, outs)
    for number in range(REPLAYS):
        fresh, start, _ = draw(2, 32, 4096, torch.bfloat16, number)
        partials.copy_(fresh)
        for each, rows in zip(residuals, owned, strict=True):
            each.copy_(start[rows])
        graph.replay()
        torch.cuda.synchronize()
        _, once = expected(fresh, start, weight)
        result, _ = expected(fresh, once.to(start.dtype), weight)
        assert relative_error(outs[0], result) <= TOLERANCES[torch.bfloat16]
        assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": CAPACITY + 1}, "129 rows: the staging is for 1 to 128"),
        ({"dtype": torch.float16}, "x is .* expected"),
        ({"hidden": 2048}, "x is .* expected"),
    ],
)
def test_other_tensors_are_refused(wrong, message):
    ranks = Ranks(Exchange.ONE_SHOT, 2, 4096, torch.bfloat16)
    given = {"rows": 4, "hidden": 4096, "dtype": torch.bfloat16} | wrong
    x = torch.zeros(given["rows"], given["hidden"], dtype=given["dtype"], device="cuda")
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match=message):
        ranks.ops[0].launch(x, None, weight, EPS)


def kept_error(residual, total):
    """Return the error of a rank's residual: none where it owns no rows."""
    return relative_error(residual, total) if len(residual) else 0.0


def _between_processes(rank, exchange):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    found = []
    for hidden, dtype in ((8192, torch.bfloat16), (4096, torch.float16)):
        world = torch.distributed.group.WORLD
        group = PushedGroup(exchange, world, device, CAPACITY, hidden, dtype)
        for number, rows in enumerate(ROWS):
            generator = torch.Generator().manual_seed(number)
            shapes = (RANKS, rows, hidden), (rows, hidden), (hidden,)
            partials, residual, weight = (
                torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes
            )
            result, total = expected(partials, residual, weight)
            owned = exchange.owned(rows, rank, RANKS)
            residual, total = (each[owned] for each in (residual, total))
            out = group.op.launch(partials[rank], residual, weight, EPS)
            errors = relative_error(out, result), kept_error(residual, total)
            found.append((*errors, TOLERANCES[dtype], out.cpu()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            group.op.launch(partials[rank], residual, weight, EPS, out=out)
        for _ in range(1000):
            residual.zero_()
            graph.replay()
        result, total = expected(partials, None, weight)
        total = total[owned]
        errors = relative_error(out, result), kept_error(residual, total)
        found.append((*errors, TOLERANCES[dtype], out.cpu()))
        group.close()
    return found


@pytest.mark.multi_gpu
@needs_two_gpus
@exchanges
def test_gpus_match_float64_and_hold_the_same_bits(exchange):
    for answers in zip(*run_ranks(_between_processes, RANKS, exchange), strict=True):
        for error, kept, allowed, out in answers:
            assert error <= allowed
            assert kept <= allowed
            assert torch.equal(out, answers[0][-1])
