"""The woven layer loop: while one half of the batch computes, the other half's sums travel."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from sglang_tokenweave.plan import Kind, Plan
from sglang_tokenweave.transport import Pending, Slot, Transport

# Returns SGLang's forward context of one half.
Context = Callable[[], AbstractContextManager[None]]


@dataclass
class Half:
    """One half of a batch on its way through the layers (or all of it, when it is not split)."""

    slot: Slot
    residual: torch.Tensor  # [rows this rank owns, hidden_size], or whole, alike on all ranks
    positions: torch.Tensor  # [num_tokens]
    batch: Any  # SGLang's ForwardBatch of these tokens
    context: Context
    has_whole_residual: bool = False
    pending: Pending | None = None
    prepare: Callable[[], None] | None = None  # for attention, once the embedding is looked up

    def wait(self) -> None:
        """Let what follows see the result of the half's last communication."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None


@dataclass(frozen=True)
class Stage:
    """A computation that leaves partial sums in the slot, and the norm that follows their sum."""

    compute: Callable[[Half], None]
    weight: torch.Tensor | None  # [hidden_size]; None: the norm is that of the next pipeline stage
    eps: float = 0.0


def run(stages: Sequence[Stage], halves: Sequence[Half], plan: Plan, transport: Transport) -> None:
    """Take `halves` through all `stages`; TokenWeave (arXiv 2505.11329), section on weaving.

    Each half waits for its own communication only, so that of the others stays hidden. Half B may
    hold the rest of a request of half A: A's keys and values of a layer are written before B reads
    them, because both halves' attention runs on the caller's stream, A first.
    """
    for stage in stages:
        for half in halves:
            half.wait()
            stage.compute(half)
            if stage.weight is None:
                continue
            # Nothing is left to compute beside the very last op, nor beside an unsplit batch.
            last = stage is stages[-1] and half is halves[-1]
            beside = plan.kind is Kind.WEAVE and not last
            half.pending = transport.allreduce_rmsnorm(
                half.slot,
                half.residual,
                stage.weight,
                stage.eps,
                ctas=plan.ctas if beside else plan.fuse_ctas,
                beside=beside,
            )
    for half in halves:
        half.wait()
