"""Several ranks on one GPU, for tests and benchmarks: each with buffers and streams of its own.

Their CTAs run side by side, so all that they launch together has to fit on the GPU at once.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sglang_tokenweave.deadlines import DEVICE_S
from sglang_tokenweave.fused import NUM_CHANNELS, SIGNAL_BYTES, FusedOp, Rows
from sglang_tokenweave.kernels import FP8
from sglang_tokenweave.transport import Slot


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


def new_stream() -> torch.cuda.Stream:
    """Return a stream of the current device."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch's gap
