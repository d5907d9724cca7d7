"""Several ranks of the copy engines on one GPU: each with memory and a stream of its own."""

import torch

from sglang_tokenweave.copy_engine import CopyEngine
from sglang_tokenweave.copy_plan import Channel, Layout, Region
from sglang_tokenweave.kernels import FP8
from sglang_tokenweave.transport import Slot, SymmetricBuffer


class EmulatedEngines:
    """What all ranks have; `close` it before another one."""

    def __init__(self, world_size, capacity, hidden, dtype, device="cuda:0", **options):
        self.layout = Layout(world_size, capacity, hidden, dtype)
        self.ranks = range(world_size)
        self.streams = [torch.cuda.Stream(device) for _ in self.ranks]

        def on_each(shape, dtype):
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in self.ranks]

        self.x, self.out = on_each((capacity, hidden), dtype), on_each((capacity, hidden), dtype)
        self.fp8 = [each.view(FP8) for each in on_each((capacity, hidden), torch.uint8)]
        self.scales = on_each((capacity,), torch.float32)
        scratch = on_each((self.layout.num_bytes,), torch.uint8)
        shared = (self.x, self.out, self.fp8, self.scales)
        torch.cuda.synchronize()
        self.engines = [
            CopyEngine(
                self.layout,
                _region(rank, scratch),
                [_region(rank, tensors) for tensors in shared],
                torch.device(device),
                can_write_fp8=True,
                **options,
            )
            for rank in self.ranks
        ]
        self._scratch = scratch

    def slot(self, rank, start, stop):
        return Slot(self.x[rank][start:stop])

    def outputs(self, kind):
        """Return by rank the buffer of a kind: "in place", "out", or "fp8"."""
        if kind == "fp8":
            return [SymmetricBuffer(*each) for each in zip(self.fp8, self.scales, strict=True)]
        return [SymmetricBuffer(each) for each in (self.x if kind == "in place" else self.out)]

    def flags(self):
        """Return the sum of all flags: zero between ops."""
        num_bytes = self.layout.count(Channel.IN_LINE)  # flags come first
        return sum(int(scratch[:num_bytes].sum()) for scratch in self._scratch)

    def close(self):
        torch.cuda.synchronize()
        for engine in self.engines:
            engine.close()


def _region(rank, tensors):
    num_bytes = tensors[0].numel() * tensors[0].itemsize
    return Region(rank, tuple(tensor.data_ptr() for tensor in tensors), num_bytes)
