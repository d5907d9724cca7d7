"""What a pipeline stage hands over: the sum over its ranks, and the residual of all rows."""

from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from sglang_tokenweave import pipeline
from sglang_tokenweave.split import UnsplittableError
from sglang_tokenweave.transport import SymmetricBuffer
from sglang_tokenweave.weave import Half

HIDDEN, CAPACITY = 8, 64
# (tokens, cut or None): one row, fewer rows than ranks, a half of one row, nothing divisible.
BATCHES = [(1, None), (2, 1), (5, 4), (30, None), (37, 11), (64, 32), (1, None), (30, None)]
WHOLE = (6, 7)  # of them: every rank holds the whole residual, as after a one-shot op


class Group:
    """The two collectives of SGLang's GroupCoordinator that a hand-over makes."""

    world_size = property(lambda self: dist.get_world_size())

    def all_reduce(self, tensor):
        dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor, dim):
        assert dim == 0
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)


def _inputs(batch, world_size):
    generator = torch.Generator().manual_seed(batch)
    tokens, _ = BATCHES[batch]
    partials = torch.randint(-99, 99, (world_size, tokens, HIDDEN), generator=generator).float()
    residual = torch.randn(tokens, HIDDEN, generator=generator)
    return partials, residual


def _on_rank(rank, world_size):
    answers = []
    for batch, (tokens, cut) in enumerate(BATCHES):
        partials, residual = _inputs(batch, world_size)
        buffer = SymmetricBuffer(torch.full((CAPACITY, HIDDEN), torch.nan))
        buffer.tensor[:tokens] = partials[rank]
        halves = []
        for start, stop in pairwise([0, tokens] if cut is None else [0, cut, tokens]):
            slot = buffer.slot(start, stop)
            rows = slot.owned_rows(rank, world_size) if batch not in WHOLE else slice(None)
            own, positions = residual[start:stop][rows].clone(), torch.arange(start, stop)
            halves.append(Half(slot, own, positions, None, nullcontext, batch in WHOLE))
        answers.append(pipeline.hand_over(buffer, halves, Group()))
        buffer.tensor.fill_(torch.nan)  # the next batch: what was handed over must not change
        if batch not in WHOLE:  # that one is fresh in every batch
            for half in halves:
                half.residual.fill_(torch.nan)
    return answers


@cache
def _results(world_size):
    return run_ranks(_on_rank, world_size, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("batch", range(len(BATCHES)), ids=lambda batch: str(BATCHES[batch]))
def test_every_rank_hands_over_all_rows(world_size, batch):
    partials, residual = _inputs(batch, world_size)
    for answers in _results(world_size):
        hidden_states, handed_over = answers[batch]
        # Whole numbers, so that no order of adding them rounds.
        assert torch.equal(hidden_states, partials.sum(0))
        assert torch.equal(handed_over, residual)


def test_takes_over_what_stock_hands_over():
    tensors = {"hidden_states": torch.ones(3, HIDDEN), "residual": torch.zeros(3, HIDDEN)}
    # SGLang sends the kind of a message with it.
    proxy = SimpleNamespace(tensors={**tensors, "__msg_type__": "proxy"})
    hidden_states, residual = pipeline.take_over(proxy, 3)
    assert hidden_states is tensors["hidden_states"]
    assert residual is tensors["residual"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"topk_indices": torch.zeros(3)}, "pipeline hands over hidden_states, residual, topk"),
        ({"residual": None}, "pipeline hands over hidden_states$"),
        ({"residual": torch.zeros(4, HIDDEN)}, "pipeline hands over a padded batch"),
    ],
)
def test_anything_else_runs_stock(change, reason):
    tensors = {"hidden_states": torch.ones(3, HIDDEN), "residual": torch.zeros(3, HIDDEN)}
    with pytest.raises(UnsplittableError, match=reason):
        pipeline.take_over(SimpleNamespace(tensors={**tensors, **change}), 3)
