"""Several ranks on one GPU, for tests and benchmarks: each with buffers and streams of its own.

Their CTAs run side by side, so all that they launch together has to fit on the GPU at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_tokenweave.deadlines import DEVICE_S
from sglang_tokenweave.fused import NUM_CHANNELS, SIGNAL_BYTES, FusedOp, Rows
from sglang_tokenweave.kernels import FP8
from sglang_tokenweave.transport import Pending, Slot, SymmetricBuffer


class EmulatedRanks:
    """What a group of processes shares, in one process.

    `x`, `other` and `fp8` are one buffer a rank, `[capacity, hidden_size]`; `scales` is that of
    `fp8`, `[capacity]`.
    """

    def __init__(
        self,
        world_size: int,
        capacity: int,
        hidden_size: int,
        dtype: torch.dtype,
        *,
        deadline_s: float = DEVICE_S,
    ) -> None:
        """Allocate on the current device, and compile.

        Raises:
            ValueError: the kernel does not serve this shape.
        """
        device = torch.device("cuda", torch.cuda.current_device())
        self.world_size = world_size
        self._shape = (capacity, hidden_size)
        self.x, self.other, self.fp8 = (self._buffers(each) for each in (dtype, dtype, FP8))
        self.scales = [torch.empty(capacity, device=device) for _ in range(world_size)]
        self.streams = [new_stream() for _ in range(NUM_CHANNELS * world_size)]
        self._signals = [
            torch.zeros(SIGNAL_BYTES, dtype=torch.uint8, device=device) for _ in range(world_size)
        ]
        pads = [signals.data_ptr() for signals in self._signals]
        self.ops = [
            FusedOp(rank, world_size, device, pads, deadline_s=deadline_s)
            for rank in range(world_size)
        ]
        for op in self.ops:
            for out in (dtype, FP8):
                op.prepare(dtype, hidden_size, out)
        torch.cuda.synchronize()

    def rows(
        self,
        rank: int,
        buffers: Sequence[torch.Tensor],
        start: int,
        stop: int,
        scales: Sequence[torch.Tensor] | None = None,
    ) -> Rows:
        """Return rows of `buffers`, one of the fields above, as `rank` reaches them."""
        slot = Slot(buffers[rank][start:stop], None if scales is None else scales[rank][start:stop])
        return Rows(
            slot,
            tuple(buffer[start:stop].data_ptr() for buffer in buffers),
            () if scales is None else tuple(each[start:stop].data_ptr() for each in scales),
            offset=start * buffers[rank].stride(0) * buffers[rank].itemsize,
        )

    def launch(self, rank: int, *arguments: Any, channel: int = 0, **options: Any) -> None:
        """Launch as `FusedOp.launch` does, on this rank's stream of the channel."""
        stream = self.streams[channel * self.world_size + rank]
        self.ops[rank].launch(*arguments, channel=channel, stream=stream, **options)

    def fork(self) -> None:
        """Order all ranks' streams behind the caller's."""
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())

    def join(self) -> None:
        """Order the caller's stream behind all ranks'."""
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)

    def _buffers(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return [
            torch.empty(self._shape, dtype=dtype, device="cuda") for _ in range(self.world_size)
        ]


def new_stream(priority: int = 0) -> torch.cuda.Stream:
    """Return a stream of the current device; a negative priority goes first."""
    return torch.cuda.Stream(priority=priority)  # type: ignore[no-untyped-call] # torch's gap


@dataclass(frozen=True)
class _AllPending:
    events: tuple[torch.cuda.Event, ...]

    def wait(self) -> None:
        """Order the caller's stream behind all ranks'."""
        for event in self.events:
            torch.cuda.current_stream().wait_event(event)


class EmulatedTransport:
    """A transport of one process that runs the kernels of several ranks.

    To the weave it is a group of one rank, so that a server without tensor parallelism can use it.
    Inside, its partial sums are those of rank 0 and the others' are zeros: the sum is that of such
    a server; kernels, barriers, streams and graphs are those of a server on several GPUs.
    """

    name = "emulated"
    rank = 0
    world_size = 1
    has_copy_engines = has_one_shot = has_two_shot = False

    def __init__(self, num_ranks: int = 2) -> None:
        """Make streams on the current device: in line and beside a computation, one a rank."""
        self._num_ranks = num_ranks
        self._streams = [
            [new_stream(priority=-1) for _ in range(num_ranks)] for _ in range(NUM_CHANNELS)
        ]

    def allocate(self, capacity: int, hidden_size: int, dtype: torch.dtype) -> SymmetricBuffer:
        """See `Transport.allocate`."""
        self._ranks = EmulatedRanks(self._num_ranks, capacity, hidden_size, dtype)
        for buffer in self._ranks.x:
            buffer.zero_()
        # The other ranks' results go elsewhere: their partial sums stay zeros.
        self._results = [self._ranks.x[0], *self._ranks.other[1:]]
        return SymmetricBuffer(self._ranks.x[0])

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
        """See `Transport.allreduce_rmsnorm`; the ranks share the SMs that one would have.

        Raises:
            ValueError: a residual is missing, the result is to go elsewhere, or there are no CTAs.
        """
        if residual is None or out is not None:
            raise ValueError("the emulation sums in place and with a residual")
        if ctas < 2:
            raise ValueError(f"ctas is {ctas}: the emulation has only the kernel, give 2 or more")
        row_bytes = slot.tensor.stride(0) * slot.tensor.itemsize
        start = (slot.tensor.data_ptr() - self._ranks.x[0].data_ptr()) // row_bytes
        span = (start, start + slot.num_tokens)
        streams = self._streams[beside]
        # By events: SGLang's breakable graphs take other forks for their own.
        begin = torch.cuda.current_stream().record_event()
        for rank, stream in enumerate(streams):
            stream.wait_event(begin)
            self._ranks.ops[rank].launch(
                self._ranks.rows(rank, self._ranks.x, *span),
                self._ranks.rows(rank, self._results, *span),
                residual[slot.owned_rows(rank, self._num_ranks)],
                weight,
                eps,
                weight_offset,
                ctas=max(2, ctas // self._num_ranks // 2 * 2),
                channel=int(beside),
                stream=stream,
            )
        pending = _AllPending(tuple(stream.record_event() for stream in streams))
        if not beside:
            pending.wait()
        return pending

    def close(self) -> None:
        """Wait for all ranks."""
        torch.cuda.synchronize()
