"""Several ranks on one GPU: each with buffers and a stream of its own, their CTAs side by side."""

import torch

from sglang_tokenweave.fused import DEADLINE_NS, SIGNAL_BYTES, FusedOp, Rows
from sglang_tokenweave.kernels import FP8
from sglang_tokenweave.transport import Slot


class EmulatedRanks:
    """What a group of processes shares, in one process."""

    def __init__(self, world_size, capacity, hidden, dtype, *, deadline_ns=DEADLINE_NS):
        device = torch.device("cuda", torch.cuda.current_device())
        self.world_size = world_size
        self.x = self._buffers(capacity, hidden, dtype)
        self.fp8 = self._buffers(capacity, hidden, FP8)
        self.scales = [torch.empty(capacity, device=device) for _ in range(world_size)]
        self.other = self._buffers(capacity, hidden, dtype)
        self.streams = [torch.cuda.Stream() for _ in range(2 * world_size)]
        self._signals = [
            torch.zeros(SIGNAL_BYTES, dtype=torch.uint8, device=device) for _ in range(world_size)
        ]
        pads = [signals.data_ptr() for signals in self._signals]
        self.ops = [
            FusedOp(rank, world_size, device, pads, deadline_ns=deadline_ns)
            for rank in range(world_size)
        ]
        for op in self.ops:
            for out in (dtype, FP8):
                op.prepare(dtype, hidden, out)
        torch.cuda.synchronize()

    def _buffers(self, capacity, hidden, dtype):
        return [
            torch.empty(capacity, hidden, dtype=dtype, device="cuda")
            for _ in range(self.world_size)
        ]

    def rows(self, rank, buffers, start, stop, scales=None):
        """Return rows of `buffers` as `rank` reaches them."""
        slot = Slot(buffers[rank][start:stop], None if scales is None else scales[rank][start:stop])
        return Rows(
            slot,
            tuple(buffer[start:stop].data_ptr() for buffer in buffers),
            () if scales is None else tuple(each[start:stop].data_ptr() for each in scales),
            offset=start * buffers[rank].stride(0) * buffers[rank].itemsize,
        )

    def launch(self, rank, *arguments, channel=0, **options):
        """Launch on this rank's stream of the channel."""
        stream = self.streams[channel * self.world_size + rank]
        self.ops[rank].launch(*arguments, channel=channel, stream=stream, **options)

    def fork(self):
        """Order all ranks' streams behind the caller's."""
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())

    def join(self):
        """Order the caller's stream behind all ranks'."""
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)
