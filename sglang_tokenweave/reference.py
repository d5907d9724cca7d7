"""The transport that defines what is correct: torch.distributed and torch arithmetic.

It runs on a CPU (gloo) and on GPUs (NCCL), beside the caller: on a worker thread or a side stream.
"""

import os
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sglang_tokenweave import deadlines
from sglang_tokenweave.agreement import naming_lost_ranks
from sglang_tokenweave.transport import Pending, Slot, StreamPending, SymmetricBuffer

LARGEST_E4M3 = 448.0


def rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add and normalise in float32; return (normalised, sum), both in the dtype of `weight`.

    The order of operations is that of SGLang's `RMSNorm.forward_native`: on a CPU the results are
    bitwise equal to the stock server's wherever the sums over the ranks are.

    Args:
        x: `[num_tokens, hidden_size]`.
        residual: the same shape, or None.
        weight: `[hidden_size]`.
    """
    total = x.to(torch.float32)
    if residual is not None:
        total = total + residual.to(torch.float32)
    scale = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + eps)
    gain = weight if weight_offset == 0.0 else weight.to(torch.float32) + weight_offset
    return (total * scale * gain).to(weight.dtype), total.to(weight.dtype)


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `rows` in FP8 (e4m3) and one float32 scale a row: its largest magnitude / 448.

    Args:
        rows: `[num_tokens, hidden_size]`; a row times its scale is the row again.
    """
    values = rows.to(torch.float32)
    largest = values.abs().amax(dim=-1)
    factor = torch.where(largest > 0, LARGEST_E4M3 / largest, 0.0)
    quantized = (values * factor[:, None]).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return quantized.to(torch.float8_e4m3fn), largest / LARGEST_E4M3


@dataclass(frozen=True)
class _ThreadPending:
    future: Future[None]
    rank: int

    def wait(self) -> None:
        if not futures.wait([self.future], deadlines.OP_S).done:
            raise RuntimeError(
                f"the op of rank {self.rank} did not end within {deadlines.OP_S:g} s "
                f"(process {os.getpid()})"
            )
        self.future.result()


class ReferenceTransport:
    """`allreduce_rmsnorm` out of an all-to-all, torch arithmetic and an all-gather."""

    name = "reference"
    has_copy_engines = False
    has_one_shot = True
    has_two_shot = False

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Take over `group`: nobody else may issue collectives on it."""
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        self._device = device
        self._worker = None
        # After an op that failed, the next one would meet another op of the other ranks.
        self._failure: Exception | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call] # torch's own gap
        else:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenweave-reference")

    @classmethod
    def create(
        cls, device: torch.device, ranks: Sequence[int] | None = None
    ) -> "ReferenceTransport":
        """Make a process group of its own; a collective call of its ranks and nobody else.

        Args:
            device: where the tensors are.
            ranks: global ranks of the tensor-parallel group; None: all of this job.
        """
        members = list(ranks) if ranks else None
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Other pipeline stages make theirs when they are ready, if at all.
        timeout = timedelta(seconds=deadlines.COLLECTIVE_S)
        group = dist.new_group(members, timeout, backend, use_local_synchronization=True)
        return cls(group, device)

    def allocate(self, capacity: int, hidden_size: int, dtype: torch.dtype) -> SymmetricBuffer:
        """Allocate ordinary memory: this transport sends copies."""
        rows = torch.zeros(capacity, hidden_size, dtype=dtype, device=self._device)
        is_fp8 = dtype == torch.float8_e4m3fn
        return SymmetricBuffer(rows, torch.zeros(capacity, device=self._device) if is_fp8 else None)

    def allreduce_rmsnorm(
        self,
        slot: Slot,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        ctas: int,
        beside: bool,
        weight_offset: float = 0.0,
        out: Slot | None = None,
    ) -> Pending:
        """See `Transport.allreduce_rmsnorm`."""

        to = slot if out is None else out
        is_whole = ctas == 0 and not beside

        def run() -> None:
            self._run(slot, residual, weight, eps, weight_offset, to, is_whole=is_whole)

        pending = self._on_thread(run) if self._worker else self._on_stream(run)
        if not beside:
            pending.wait()
        return pending

    def close(self) -> None:
        """Stop the worker thread."""
        if self._worker:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _on_thread(self, run: Callable[[], None]) -> Pending:
        assert self._worker is not None

        def run_unless_failed() -> None:
            if self._failure is not None:
                raise self._failure
            try:
                # Inference mode belongs to a thread; SGLang's tensors may change only inside it.
                with torch.inference_mode():
                    run()
            except Exception as error:
                self._failure = error
                raise

        return _ThreadPending(self._worker.submit(run_unless_failed), self.rank)

    def _on_stream(self, run: Callable[[], None]) -> Pending:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
            return StreamPending(self._stream.record_event())

    def _run(
        self,
        slot: Slot,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: Slot,
        *,
        is_whole: bool,  # the residual
    ) -> None:
        mine = self._reduce_scatter(slot)
        owned = slot.owned_rows(self.rank, self.world_size)
        mine = mine[: owned.stop - owned.start]
        own = residual[owned] if is_whole and residual is not None else residual
        normalised, total = rmsnorm(mine, own, weight, eps, weight_offset)
        if is_whole and residual is not None:
            self._all_gather(total, residual)
        elif residual is not None:
            residual.copy_(total)
        if out.scales is None:
            self._all_gather(normalised, out.tensor)
            return
        rows, scales = quantize(normalised)
        # As bytes: not every backend moves FP8.
        self._all_gather(rows.view(torch.uint8), out.tensor.view(torch.uint8))
        self._all_gather(scales[:, None], out.scales[:, None])

    def _reduce_scatter(self, slot: Slot) -> torch.Tensor:
        """Return the float32 sums `[share, hidden_size]` of this rank's rows, in rank order."""
        share = -(-slot.num_tokens // self.world_size)
        padded = slot.tensor.new_zeros(share * self.world_size, slot.tensor.shape[1])
        padded[: slot.num_tokens] = slot.tensor
        # Whoever reads the slot before `wait` must not get away with it.
        slot.tensor.fill_(float("nan"))
        parts = torch.empty_like(padded)
        with naming_lost_ranks(self.rank, self.world_size):
            dist.all_to_all_single(parts, padded, group=self._group)
        ranks = parts.view(self.world_size, share, -1).to(torch.float32)
        total = ranks[0]
        for rank in range(1, self.world_size):
            total = total + ranks[rank]
        return total

    def _all_gather(self, own: torch.Tensor, out: torch.Tensor) -> None:
        share = -(-out.shape[0] // self.world_size)
        padded = own.new_zeros(share, own.shape[1])
        padded[: own.shape[0]] = own
        gathered = padded.new_empty(self.world_size, share, padded.shape[1])
        with naming_lost_ranks(self.rank, self.world_size):
            dist.all_gather(list(gathered), padded, group=self._group)
        out.copy_(gathered.flatten(0, 1)[: out.shape[0]])
