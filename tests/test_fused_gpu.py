"""The fused kernel with 2 to 8 ranks on one GPU: all that does not need a link between GPUs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_tokenweave.emulation import EmulatedRanks
from sglang_tokenweave.reference import rmsnorm

EPS = 1e-5
CAPACITY = 301
# Rounding to n bits of fraction is 2^-n / sqrt(12) rms of a value between 1 and 2: 1.7e-3 was seen
# for bf16, 2.1e-4 for fp16 and 2.7e-2 for e4m3. Twice that is allowed.
TOLERANCES = {torch.bfloat16: 3.4e-3, torch.float16: 4.2e-4, torch.float8_e4m3fn: 5.4e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def draw(world_size, rows, hidden, dtype, seed=0):
    """Return partial sums by rank, the residual and a weight."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (world_size, rows, hidden), (rows, hidden), (hidden,)
    return [torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes]


def expected(partials, residual, weight, offset=0.0):
    total = partials.double().sum(0) + (0 if residual is None else residual.double())
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
    return total * scale * (offset + weight.double()), total


def relative_error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


def fill(ranks, partials):
    """Put the partial sums in place and poison everything that is to be written, and the rest."""
    for buffer in (*ranks.x, *ranks.other, *ranks.scales):
        buffer.fill_(float("nan"))
    for buffer in ranks.fp8:
        buffer.view(torch.uint8).fill_(0x7F)  # NaN
    for rank, part in enumerate(partials):
        ranks.x[rank][: part.shape[0]].copy_(part)


def shards_of(ranks, residual):
    if residual is None:
        return [None] * ranks.world_size
    slots = [
        ranks.rows(rank, ranks.x, 0, residual.shape[0]).slot for rank in range(ranks.world_size)
    ]
    return [
        residual[slot.owned_rows(rank, ranks.world_size)].clone() for rank, slot in enumerate(slots)
    ]


def launch_all(ranks, rows, shards, weight, *, into="x", ctas=8, offset=0.0, channel=0):
    for rank in range(ranks.world_size):
        x = ranks.rows(rank, ranks.x, *rows)
        out = {
            "x": lambda x=x: x,
            "other": lambda rank=rank: ranks.rows(rank, ranks.other, *rows),
            "fp8": lambda rank=rank: ranks.rows(rank, ranks.fp8, *rows, ranks.scales),
        }[into]()
        arguments = (x, out, shards[rank], weight, EPS, offset)
        ranks.launch(rank, *arguments, ctas=ctas, channel=channel)


def outputs_of(ranks, into, rows):
    if into == "fp8":
        pairs = zip(ranks.fp8, ranks.scales, strict=True)
        return [each[:rows].double() * scale[:rows, None] for each, scale in pairs]
    return [each[:rows] for each in (ranks.x if into == "x" else ranks.other)]


SHAPES = [
    (2, 8192, torch.bfloat16),
    (2, 264, torch.float16),
    (4, 5120, torch.bfloat16),
    (6, 1024, torch.bfloat16),
    (8, 7168, torch.float16),
    (8, 16384, torch.bfloat16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_and_all_ranks_hold_the_same_bits(shape):
    world_size, hidden, dtype = shape
    ranks = EmulatedRanks(world_size, CAPACITY, hidden, dtype)
    for number, rows in enumerate((1, world_size - 1, 64, 299)):
        for into in ("x", "other", "fp8"):
            partials, residual, weight = draw(world_size, rows, hidden, dtype, number)
            residual = None if number % 2 and into == "other" else residual
            offset = float(number % 2)
            fill(ranks, partials)
            shards = shards_of(ranks, residual)
            ranks.fork()
            launch_all(
                ranks,
                (0, rows),
                shards,
                weight,
                into=into,
                ctas=2 << number,
                offset=offset,
            )
            ranks.join()
            torch.cuda.synchronize()
            wanted, total = expected(partials, residual, weight, offset)
            outputs = outputs_of(ranks, into, rows)
            out_dtype = torch.float8_e4m3fn if into == "fp8" else dtype
            assert relative_error(outputs[0], wanted) < TOLERANCES[out_dtype]
            assert all(torch.equal(output, outputs[0]) for output in outputs)
            if residual is not None:
                assert relative_error(torch.cat(shards), total) < TOLERANCES[dtype]
            target = {"x": ranks.x, "other": ranks.other, "fp8": ranks.scales}[into]
            assert all(bool(buffer[rows:].isnan().all()) for buffer in target)


@pytest.mark.parametrize("heavy_tailed", [False, True])
def test_error_is_no_larger_than_stocks(heavy_tailed):
    """Stock rounds the sum over the ranks to bf16 before it adds the residual; this op does not."""
    partials, residual, weight = draw(2, 256, 8192, torch.bfloat16)
    if heavy_tailed:
        partials = (partials.float().pow(3) * 4).to(torch.bfloat16)
    ranks = EmulatedRanks(2, 256, 8192, torch.bfloat16)
    fill(ranks, partials)
    ranks.fork()
    launch_all(ranks, (0, 256), shards_of(ranks, residual), weight)
    ranks.join()
    wanted, _ = expected(partials, residual, weight)
    reduced = partials.float().sum(0).to(torch.bfloat16)
    stock, _ = rmsnorm(reduced, residual, weight, EPS)
    assert relative_error(ranks.x[0], wanted) <= relative_error(stock, wanted)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_thousand_replays_on_two_channels_give_what_eager_launches_give(world_size):
    hidden, rows = 4096, 128
    first, second = (0, 60), (60, rows)  # an empty share for nobody, uneven shares for all
    ranks = EmulatedRanks(world_size, rows, hidden, torch.bfloat16)
    partials, _, weight = draw(world_size, rows, hidden, torch.bfloat16)

    def step():
        ranks.fork()
        launch_all(ranks, first, [None] * world_size, weight, ctas=4, channel=0)
        launch_all(ranks, second, [None] * world_size, weight, ctas=6, channel=1)
        ranks.join()

    fill(ranks, partials)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            step()
    fill(ranks, partials)
    for _ in range(250):
        graph.replay()
    replayed = [buffer.clone() for buffer in ranks.x]
    fill(ranks, partials)
    for _ in range(1000):
        step()
    torch.cuda.synchronize()
    for rank in range(world_size):
        assert torch.equal(replayed[rank], replayed[0])
        assert torch.equal(replayed[rank], ranks.x[rank])
    assert not bool(replayed[0].isnan().any())


def test_a_rank_may_be_late_by_seconds():
    ranks = EmulatedRanks(2, 64, 1024, torch.bfloat16)
    partials, residual, weight = draw(2, 64, 1024, torch.bfloat16)
    fill(ranks, partials)
    ranks.fork()
    with torch.cuda.stream(ranks.streams[1]):
        torch.cuda._sleep(4 * 10**9)  # cycles: about two seconds
    launch_all(ranks, (0, 64), shards_of(ranks, residual), weight)
    ranks.join()
    torch.cuda.synchronize()
    wanted, _ = expected(partials, residual, weight)
    assert relative_error(ranks.x[0], wanted) < TOLERANCES[torch.bfloat16]


def test_wrong_arguments_are_refused_before_the_launch():
    ranks = EmulatedRanks(2, 64, 1024, torch.bfloat16)
    rows, weight = ranks.rows(0, ranks.x, 0, 64), torch.ones(1024).bfloat16().cuda()
    op, stream = ranks.ops[0], torch.cuda.current_stream()
    for residual, gain, named in (
        (torch.zeros(64, 1024).bfloat16().cuda(), weight, "residual is"),
        (None, weight.float(), "weight is"),
        (None, weight[1:], "weight is"),
    ):
        with pytest.raises(ValueError, match=named):
            op.launch(rows, rows, residual, gain, EPS, 0.0, ctas=2, channel=0, stream=stream)


def run_script(text, *prefix, timeout_s=120):
    """Run a program that may lose its CUDA context."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [*prefix, sys.executable, "-c", text],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


PREPARE = """
import torch
from sglang_tokenweave.emulation import EmulatedRanks
ranks = EmulatedRanks(2, 64, 1024, torch.bfloat16, deadline_s=2)
weight = torch.ones(1024, dtype=torch.bfloat16, device="cuda")
def launch(rank, rows=64, ctas=2):
    x = ranks.rows(rank, ranks.x, 0, rows)
    ranks.launch(rank, x, x, None, weight, 1e-5, 0.0, ctas=ctas)
"""


def test_a_dead_rank_is_named_within_the_deadline():
    done = run_script(PREPARE + "launch(0)\ntorch.cuda.synchronize()")
    assert done.returncode != 0
    assert "tokenweave: rank 0, CTA 0 waited 2000 ms for rank 1: epoch 1, seen 0" in done.stdout
    assert "unspecified launch failure" in done.stderr


@pytest.mark.parametrize("other", ["rows=62", "ctas=4"])
def test_ranks_with_other_arguments_stop_at_once(other):
    done = run_script(PREPARE + f"launch(0)\nlaunch(1, {other})\ntorch.cuda.synchronize()")
    assert done.returncode != 0
    assert "runs the op with other arguments" in done.stdout
    assert "waited" not in done.stdout


SANITIZED = """
for rows in (1, 7, 64):
    for rank in range(2):
        launch(rank, rows)
torch.cuda.synchronize()
print("ended")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # Under the tool a kernel takes seconds, and one waits for the other.
    prepare = PREPARE.replace("deadline_s=2", "deadline_s=200")
    done = run_script(
        prepare + SANITIZED,
        str(Path(sanitizer)),
        "--tool",
        tool,
        "--error-exitcode",
        "99",
        "--report-api-errors",  # cuda-python asks for functions that a driver may lack
        "no",
        timeout_s=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "ended" in done.stdout
