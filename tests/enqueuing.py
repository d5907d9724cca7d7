"""Ranks of copy engines in one process: what each one's host code enqueues, on a CPU's memory."""

from contextlib import contextmanager

import torch
from streams import Recorder

from sglang_tokenweave.copy_engine import CopyEngine
from sglang_tokenweave.copy_plan import Layout, Region
from sglang_tokenweave.kernels import FP8

EPS = 1e-5
MODES = ("memory_ops", "kernels")


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


class Cluster:
    """What the engines of all ranks need, and what each rank enqueued."""

    def __init__(self, monkeypatch, world_size, capacity=64, hidden=16, dtype=torch.bfloat16):
        self.monkeypatch = monkeypatch
        self.layout = Layout(world_size, capacity, hidden, dtype)
        ranks = range(world_size)
        self.x = [torch.full((capacity, hidden), torch.nan, dtype=dtype) for _ in ranks]
        self.out = [torch.full((capacity, hidden), torch.nan).to(FP8) for _ in ranks]
        self.scales = [torch.full((capacity,), torch.nan) for _ in ranks]
        self.scratch = [torch.zeros(self.layout.num_bytes, dtype=torch.uint8) for _ in ranks]
        self.recorders = [Recorder() for _ in ranks]
        self.engines = []
        self.results = {}
        self.num_checks = 0

    def region(self, rank, tensors):
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        return Region(rank, addresses, tensors[0].numel() * tensors[0].itemsize)

    def on_each_rank(self, enqueue, **options):
        """Call `enqueue(rank, engine, recorder)` as each rank, once; return the programs."""
        for rank, recorder in enumerate(self.recorders):
            recorder.install(self.monkeypatch)
            regions = [self.region(rank, each) for each in (self.x, self.out, self.scales)]
            scratch = self.region(rank, self.scratch)
            device = torch.device("cuda", 0)
            engine = CopyEngine(self.layout, scratch, regions, device, **options)
            self.engines.append(engine)
            enqueue(rank, engine, recorder)
        return [recorder.program for recorder in self.recorders]

    def close(self):
        for engine, recorder in zip(self.engines, self.recorders, strict=False):
            recorder.install(self.monkeypatch)
            engine.close()
            assert not recorder.live


@contextmanager
def clusters(monkeypatch):
    """Yield a function that makes a `Cluster`; close all of them in the end."""
    made = []

    def make(*arguments, **options):
        made.append(Cluster(monkeypatch, *arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
