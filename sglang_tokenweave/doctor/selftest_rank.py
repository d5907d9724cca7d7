"""One rank of the self-test: run the op, compare it with float64, measure it and the link."""

import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sglang_tokenweave.transport import SymmetricBuffer, Transport

T = TypeVar("T")
Factory = Callable[[dist.ProcessGroup, torch.device], Transport]

EPS = 1e-5
DTYPE = torch.bfloat16
# bf16 rounds to 2^-9 relative, 1.7e-3 in the root mean square; twice that is allowed.
TOLERANCE = 4e-3
TIMED_TOKENS = (1024, 8192)
CTAS = 16  # the default beside nothing
_LINK_BYTES = 256 * 2**20
_ROUNDS, _LAUNCHES = 7, 5


@dataclass(frozen=True)
class Case:
    """One call of the op."""

    num_tokens: int
    has_residual: bool
    beside: bool


# One row, odd, fewer rows than CTAs, many; each twice, because stale barriers show then.
CASES = tuple(
    Case(num_tokens, has_residual, beside)
    for num_tokens in (1, 7, 300, 1031)
    for has_residual, beside in ((True, False), (False, True))
)


@dataclass(frozen=True)
class Outcome:
    """What came of a case on one rank."""

    case: Case
    error: float  # relative, root mean square; of the output or of the residual, the larger
    is_tidy: bool  # rows beyond the case's were left alone
    digest: str  # of the output: all ranks must hold the same bits


@dataclass(frozen=True)
class Timings:
    """What was measured, of the slowest rank."""

    link_gb_per_s: float  # sent while as much is received
    op_us: tuple[float, ...]  # for each of TIMED_TOKENS


def gather(value: T, group: dist.ProcessGroup) -> list[T]:
    """Return the values of all ranks in rank order; a collective call on a CPU group."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def run(
    factory: Factory,
    group: dist.ProcessGroup,
    device: torch.device,
    hidden_size: int,
    is_timed: bool,
) -> tuple[tuple[Outcome, ...], Timings | None]:
    """Run all cases on this rank, then measure if asked to; a collective call."""
    transport = factory(group, device)
    capacity = max(TIMED_TOKENS) if is_timed else max(case.num_tokens for case in CASES) + 1
    buffer = transport.allocate(capacity, hidden_size, DTYPE)
    outcomes = tuple(_run_case(transport, buffer, case) for case in CASES)
    timings = None
    if is_timed:
        op_us = tuple(_time_op(transport, buffer, tokens, group) for tokens in TIMED_TOKENS)
        timings = Timings(_time_link(device, group), op_us)
    transport.close()
    return outcomes, timings


def _run_case(transport: Transport, buffer: SymmetricBuffer, case: Case) -> Outcome:
    partials, residual, weight = _inputs(transport.world_size, case, buffer.tensor)
    buffer.tensor.fill_(float("nan"))  # every row must be written, and none beyond
    slot = buffer.slot(0, case.num_tokens)
    slot.tensor.copy_(partials[transport.rank])
    owned = slot.owned_rows(transport.rank, transport.world_size)
    shard = residual[owned].clone() if case.has_residual else None
    transport.allreduce_rmsnorm(slot, shard, weight, EPS, ctas=CTAS, beside=case.beside).wait()
    total = partials.double().sum(0) + (residual.double() if case.has_residual else 0)
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
    errors = [_relative_error(slot.tensor, total * scale * weight.double())]
    if shard is not None:
        errors.append(_relative_error(shard, total[owned]))
    output = slot.tensor.cpu().view(torch.uint8).numpy().tobytes()
    return Outcome(
        case=case,
        error=max(errors),
        is_tidy=bool(buffer.tensor[case.num_tokens :].isnan().all()),
        digest=hashlib.sha256(output).hexdigest(),
    )


def _inputs(world_size: int, case: Case, like: torch.Tensor) -> list[torch.Tensor]:
    # Alike on all ranks, so on the CPU: GPUs of two kinds draw different numbers from one seed.
    generator = torch.Generator().manual_seed(case.num_tokens)
    rows = (case.num_tokens, like.shape[1])
    shapes = ((world_size, *rows), rows, rows[1:])
    return [torch.randn(shape, generator=generator).to(like) for shape in shapes]


def _relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    error = (value.double() - expected).norm() / expected.norm()
    # NaN compares with nothing: a row that was never written must not pass.
    return float(error.nan_to_num(float("inf")))


def _time_op(
    transport: Transport, buffer: SymmetricBuffer, num_tokens: int, group: dist.ProcessGroup
) -> float:
    slot = buffer.slot(0, num_tokens)
    slot.tensor.normal_()
    weight = torch.ones_like(slot.tensor[0])

    def launch() -> None:
        transport.allreduce_rmsnorm(slot, None, weight, EPS, ctas=CTAS, beside=False)

    return _time_us(launch, group)


def _time_link(device: torch.device, group: dist.ProcessGroup) -> float:
    """Return GB/s of a copy to the next rank's GPU while the one before copies to this one."""
    peer = gather(str(device), group)[(dist.get_rank(group) + 1) % dist.get_world_size(group)]
    source = torch.zeros(_LINK_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source, device=peer)

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    return _LINK_BYTES / _time_us(copy, group) / 1e3


def _time_us(launch: Callable[[], None], group: dist.ProcessGroup) -> float:
    """Return the median time of a launch, that of the slowest rank."""
    times = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        dist.barrier(group)
        launch()  # warm, and the ranks are in step after it
        start, end = _event(), _event()
        start.record()
        for _ in range(_LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / _LAUNCHES)
    return max(gather(float(statistics.median(times)), group))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch's own gap
