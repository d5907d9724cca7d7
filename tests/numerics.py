"""The op over many steps with fresh data: every rank the same bits, and float64 close to them.

`python tests/numerics.py --steps 10000 --output docs/reliability/numerics.json` runs the reference
transport on two ranks and the fused kernel's own sources, built for a CPU, on two to eight.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import recording
import test_kernel_on_cpu as kernel
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_kernel_on_cpu import SMALL, WIDE, Case, Host

from sglang_tokenweave.reference import ReferenceTransport, rmsnorm

EPS = 1e-5
WORLD_SIZE = 2
HIDDEN = 256
MOST_ROWS = 48
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half of the last digit's place, for the one rounding to the result's type ...
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LEAST = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
# ... and float32's in the sums of two ranks and the residual, in the 256 squares, root, products.
ROUNDING = 40 * 2.0**-24
LAUNCHES = 125  # of the kernel in one process
# Ranks by two, four and eight; shared memory between warps; FP8; the sum made by the switch.
HOSTED = [SMALL[0], SMALL[4], SMALL[5], WIDE[1], WIDE[2]]


@dataclass(frozen=True)
class Step:
    """What goes in: partial sums by rank, residual, weight."""

    partials: torch.Tensor  # [WORLD_SIZE, rows, HIDDEN]
    residual: torch.Tensor  # [rows, HIDDEN]
    weight: torch.Tensor  # [HIDDEN]


def draw(step: int) -> Step:
    """Return the data of a step: of other sizes, types and magnitudes from one to the next."""
    generator = torch.Generator().manual_seed(step)
    rows = int(torch.randint(1, MOST_ROWS + 1, (), generator=generator))
    magnitude = 10.0 ** float(torch.empty(()).uniform_(-3, 3, generator=generator))
    shapes = (WORLD_SIZE, rows, HIDDEN), (rows, HIDDEN), (HIDDEN,)
    partials, residual, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    dtype = DTYPES[step % len(DTYPES)]
    return Step(*((each * magnitude).to(dtype) for each in (partials, residual)), weight.to(dtype))


def error(step: Step, rows: slice, out: torch.Tensor, total: torch.Tensor) -> float:
    """Return the largest distance from float64, as a part of what is allowed.

    Args:
        rows: those of which `total`, `[owned rows, HIDDEN]`, is the new residual.
        out: `[rows, HIDDEN]`, normalised.
    """
    dtype = out.dtype
    addends = [*step.partials.double(), step.residual.double()]
    exact = sum(addends)
    magnitude = sum(each.abs() for each in addends)
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + EPS)
    expected = exact * scale * step.weight.double()
    absolute = ROUNDING * (magnitude * scale * step.weight.double().abs() + expected.abs())
    allowed = absolute + (HALF_ULP[dtype] * expected.abs()).clamp_min(LEAST[dtype])
    worst = ((out.double() - expected).abs() / allowed).max()
    kept = (ROUNDING * magnitude + (HALF_ULP[dtype] * exact.abs()).clamp_min(LEAST[dtype]))[rows]
    of_total = (total.double() - exact[rows]).abs() / kept
    return max(float(worst), float(of_total.max()) if len(of_total) else 0.0)


def run_reference(num_steps: int) -> float:
    """Run the reference transport on two ranks; return the largest error.

    Raises:
        AssertionError: ranks hold different bits after a step.
    """
    return max(run_ranks(_on_rank, WORLD_SIZE, num_steps, timeout_s=1800))


def _on_rank(rank: int, num_steps: int) -> float:
    transport = ReferenceTransport.create(torch.device("cpu"))
    buffers = {dtype: transport.allocate(MOST_ROWS, HIDDEN, dtype) for dtype in DTYPES}
    worst = 0.0
    for number in range(num_steps):
        step = draw(number)
        num_rows, dtype = len(step.residual), step.residual.dtype
        slot = buffers[dtype].slot(0, num_rows)
        slot.tensor.copy_(step.partials[rank])
        owned = slot.owned_rows(rank, WORLD_SIZE)
        shard = step.residual[owned].clone()
        transport.allreduce_rmsnorm(
            slot, shard, step.weight, EPS, ctas=2, beside=number % 2 == 0
        ).wait()
        _check_alike(number, slot.tensor)
        worst = max(worst, error(step, owned, slot.tensor, shard))
    transport.close()
    return worst


def _check_alike(number: int, mine: torch.Tensor) -> None:
    first = mine.clone().view(torch.uint8)
    dist.broadcast(first, 0)
    assert torch.equal(first, mine.view(torch.uint8)), f"step {number}: ranks hold different bits"


def build_kernel(folder: Path) -> Host:
    """Compile the kernel's sources for this CPU."""
    return kernel.build(folder, HOSTED)


def kernel_cases(num_steps: int) -> Iterator[Case]:
    """Yield cases of `LAUNCHES` launches each, `num_steps` in all."""
    for start in range(0, num_steps, LAUNCHES):
        random = np.random.default_rng(start)
        variant = HOSTED[start // LAUNCHES % len(HOSTED)]
        most = variant.num_vecs * variant.group_threads
        yield Case(
            variant,
            hidden=8 * int(random.integers(1, most + 1)),
            num_tokens=tuple(map(int, random.integers(1, 12, min(LAUNCHES, num_steps - start)))),
            num_ctas=int(random.integers(1, 3)),
            is_in_place=bool(random.integers(2)),
            weight_offset=float(random.integers(2)),
            first_epoch=int(random.choice([0, 2**32 - 100])),  # it wraps around
            seed=start,
        )


def run_kernel(host: Host, num_steps: int) -> None:
    """Run the kernel; each launch has data of its own.

    Raises:
        AssertionError: ranks hold different bits, or float64 is further away than allowed.
    """
    for case in kernel_cases(num_steps):
        kernel.check(host, case)


def special_rows(dtype: torch.dtype) -> torch.Tensor:
    """Return partial sums of two ranks, `[2, rows, HIDDEN]`, with a hard case in each row."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    partials = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
    partials[:, 0] = largest / 4  # the squares are beyond float32 where the type's range is its
    partials[:, 1] = largest  # so is the sum, or beyond the type
    partials[0, 2], partials[1, 2] = largest, -largest
    partials[:, 3] = smallest / 4  # denormal
    partials[:, 4, ::2] = 0.0
    partials[0, 5, 7] = torch.inf
    partials[0, 6, 7], partials[1, 6, 7] = torch.inf, -torch.inf
    partials[1, 7, 3] = torch.nan
    partials[:, 8] = 0.0
    return partials


def expected_specials(partials: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what SGLang's formula makes of the float32 sum: the result and the new residual."""
    total = sum(partials.float())
    return rmsnorm(total, torch.zeros_like(partials[0]), weight, EPS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the op over many steps.")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    steps = options.steps
    recording.commit()  # that of now, not of the end
    worst = run_reference(steps)
    with tempfile.TemporaryDirectory() as folder:
        run_kernel(build_kernel(Path(folder)), steps)
    recording.write(
        options.output,
        title="The op over many steps with fresh data",
        command=" ".join(["python tests/numerics.py", *words]),
        columns=(
            "op",
            "ranks",
            "types",
            "steps",
            "ranks alike, bit by bit",
            "float64 within bound",
        ),
        rows=[
            ["reference", "2", "fp32, bf16, fp16", steps, steps, f"{steps} (at most {worst:.0%})"],
            ["kernel, on the CPU", "2, 4, 8", "bf16, fp16, FP8 out", steps, steps, steps],
        ],
        notes=[
            "Close: within one rounding to the result's type and those of float32 in the sums, the "
            "squares, the root and the products.",
            "The kernel's sources are those that a GPU runs, built for a CPU with tests/host/.",
        ],
    )
    print(options.output.read_text())
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
