"""One stage of SGLang's pipeline parallelism: what it takes from the stage before and hands on.

In every supported release of SGLang a stage hands over two tensors, both alike on all of its
tensor-parallel ranks: the last feed-forward part's sum over the ranks, and the residual before that
sum is added. A woven stage keeps to it, so its neighbours may run a batch woven or stock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_tokenweave import seams
from sglang_tokenweave.split import UnsplittableError
from sglang_tokenweave.transport import SymmetricBuffer
from sglang_tokenweave.weave import Half

_HANDED_OVER = {"hidden_states", "residual"}


@dataclass(frozen=True)
class PipelineStage:
    """This process's place in the pipeline; without a pipeline it is first and last at once."""

    is_first: bool
    is_last: bool
    group: Any  # SGLang's GroupCoordinator of the stage's tensor-parallel ranks

    @property
    def is_whole(self) -> bool:
        """Whether this process runs all layers."""
        return self.is_first and self.is_last

    @classmethod
    def of(cls, inner: Any) -> "PipelineStage":
        """Return the place of `inner` (SGLang's `XModel`)."""
        place = inner.pp_group
        return cls(place.is_first_rank, place.is_last_rank, seams.tensor_parallel_group())


def take_over(proxy: Any, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (hidden states, residual), both `[num_tokens, hidden_size]`, of SGLang's proxy.

    Raises:
        UnsplittableError: the stage before hands over something else.
    """
    tensors = {name: x for name, x in proxy.tensors.items() if isinstance(x, torch.Tensor)}
    if set(tensors) != _HANDED_OVER:
        raise UnsplittableError(f"pipeline hands over {', '.join(sorted(tensors))}")
    if any(tensor.shape[0] != num_tokens for tensor in tensors.values()):
        raise UnsplittableError("pipeline hands over a padded batch")
    return tensors["hidden_states"], tensors["residual"]


def hand_over(
    buffer: SymmetricBuffer, halves: Sequence[Half], group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (hidden states, residual) of `halves`, whose slots hold partial sums.

    A collective call of `group`.

    Both collectives are SGLang's own and run in line, whatever the transport: once a stage they are
    not worth an op of each. The tensors are fresh: SGLang sends them while later batches run.
    """
    num_tokens = sum(half.slot.num_tokens for half in halves)
    # Not on the buffer itself: SGLang may reduce in place, and may return what it was given.
    hidden_states = group.all_reduce(buffer.slot(0, num_tokens).tensor.clone())
    return hidden_states, _gather_residual(halves, group)


def _gather_residual(halves: Sequence[Half], group: Any) -> torch.Tensor:
    """Return the residual of all rows, of which each rank holds its own, in one collective."""
    if halves[0].has_whole_residual:
        return halves[0].residual
    shares = [half.slot.share(group.world_size) for half in halves]
    hidden_size = halves[0].residual.shape[1]
    mine = halves[0].residual.new_zeros(sum(shares), hidden_size)
    for half, rows in zip(halves, mine.split_with_sizes(shares), strict=True):
        rows[: half.residual.shape[0]] = half.residual
    ranks = group.all_gather(mine, dim=0).view(group.world_size, sum(shares), hidden_size)
    parts = [
        part.flatten(0, 1)[: half.slot.num_tokens]
        for half, part in zip(halves, ranks.split_with_sizes(shares, dim=1), strict=True)
    ]
    return torch.cat(parts)
