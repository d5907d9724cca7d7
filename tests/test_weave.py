"""The woven loop: equal to a plain loop, and wrong as soon as a wait is missing."""

from contextlib import nullcontext
from functools import cache
from itertools import pairwise

import pytest
import torch
from distributed import run_ranks

from sglang_tokenweave import weave
from sglang_tokenweave.plan import Kind, Plan
from sglang_tokenweave.reference import ReferenceTransport, rmsnorm
from sglang_tokenweave.weave import Half, Stage

ROWS, HIDDEN, STAGES, EPS = 30, 32, 8, 1e-6


def _weights(world_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, HIDDEN, generator=generator)
    layers = torch.randn(STAGES, world_size, HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    norms = 1 + torch.rand(STAGES, HIDDEN, generator=generator)
    return x, layers, norms


def _plain(world_size):
    """One process, no communication: sum over what the ranks would have computed."""
    x, layers, norms = _weights(world_size)
    residual = x
    for stage in range(STAGES):
        partials = [torch.tanh(x @ layers[stage, rank]) for rank in range(world_size)]
        x, residual = rmsnorm(sum(partials), residual, norms[stage], EPS)
    return x


PLANS = (
    Plan(Kind.FUSE, fuse_ctas=16),
    *(Plan(Kind.WEAVE, cut, 8, 16) for cut in (1, 7, 15, 29)),
    Plan(Kind.FUSE),  # one-shot
)


def _on_rank(rank, world_size):
    right = [_woven(rank, world_size, plan) for plan in PLANS]
    wrong = [_woven(rank, world_size, PLANS[3], forget=index) for index in (0, 1)]
    return right, wrong


@cache
def _results(world_size):
    return run_ranks(_on_rank, world_size, world_size)


def _woven(rank, world_size, plan, forget=None):
    x, layers, norms = _weights(world_size)
    transport = ReferenceTransport.create(torch.device("cpu"))
    buffer = transport.allocate(ROWS, HIDDEN, torch.float32)
    buffer.tensor.copy_(x)
    cuts = [0, plan.cut, ROWS] if plan.cut else [0, ROWS]
    halves = []
    for start, stop in pairwise(cuts):
        slot = buffer.slot(start, stop)
        rows = slice(None) if plan.is_one_shot else slot.owned_rows(rank, world_size)
        residual = x[start:stop][rows].clone()
        halves.append(Half(slot, residual, torch.arange(start, stop), None, nullcontext))

    def compute(stage):
        def run(half):
            half.slot.tensor.copy_(torch.tanh(half.slot.tensor @ layers[stage, rank]))

        return run

    stages = [Stage(compute(index), norms[index], EPS) for index in range(STAGES)]
    if forget is not None:  # one half does not wait: somebody must read what is under way
        halves[forget].wait = lambda: None
    weave.run(stages, halves, plan, transport)
    for half in halves:
        if half.pending:
            half.pending.wait()
    transport.close()
    return buffer.tensor.clone()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("index", range(len(PLANS)), ids=lambda index: str(PLANS[index]))
def test_equals_a_plain_loop(world_size, index):
    for right, _ in _results(world_size):
        # float32 through 8 stages; the products of fewer rows may be blocked differently.
        torch.testing.assert_close(right[index], _plain(world_size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("forget", [0, 1])
def test_a_forgotten_wait_shows(world_size, forget):
    for _, wrong in _results(world_size):
        assert not torch.allclose(wrong[forget], _plain(world_size), rtol=1e-4, atol=1e-5)
