"""The interface of the communication op: who moves the bytes is a detail behind it."""

from dataclasses import dataclass
from typing import Protocol

import torch


def owned_rows(num_rows: int, rank: int, world_size: int) -> slice:
    """Return the rows that `rank` alone reduces, normalises and keeps the residual of.

    Shares are contiguous and of ceil(num_rows / world_size) rows; the last ones may be short or
    empty.
    """
    share = -(-num_rows // world_size)
    return slice(min(rank * share, num_rows), min((rank + 1) * share, num_rows))


@dataclass(frozen=True)
class Slot:
    """Consecutive rows of a symmetric buffer: one half batch's activations.

    Between two communications a slot holds this rank's partial sums; after one, the normalised
    rows, alike on every rank.
    """

    tensor: torch.Tensor  # [num_tokens, hidden_size], a view of the buffer
    scales: torch.Tensor | None = None  # of FP8 rows: [num_tokens] float32, one factor a row

    @property
    def num_tokens(self) -> int:
        return self.tensor.shape[0]

    def share(self, world_size: int) -> int:
        """Return the rows that each rank owns, the last ones at most."""
        return -(-self.num_tokens // world_size)

    def owned_rows(self, rank: int, world_size: int) -> slice:
        """Return this slot's rows of a rank, as the function of this name."""
        return owned_rows(self.num_tokens, rank, world_size)


@dataclass(frozen=True)
class SymmetricBuffer:
    """Memory of the same size on every rank, reachable by all of them."""

    tensor: torch.Tensor  # [capacity, hidden_size]
    scales: torch.Tensor | None = None  # of an FP8 buffer: [capacity] float32

    @property
    def capacity(self) -> int:
        return self.tensor.shape[0]

    def slot(self, start: int, stop: int) -> Slot:
        """Return rows `start` to `stop`.

        Raises:
            ValueError: the rows are not inside the buffer.
        """
        if not 0 <= start < stop <= self.capacity:
            raise ValueError(f"rows {start}:{stop} are outside the buffer's 0:{self.capacity}")
        scales = None if self.scales is None else self.scales[start:stop]
        return Slot(self.tensor[start:stop], scales)


class Pending(Protocol):
    """A communication under way. Until `wait`, nobody may touch its slot or its residual."""

    def wait(self) -> None:
        """Let everything the caller does from now on see the result.

        Raises:
            RuntimeError: the communication failed (a peer died, a deadline passed).
        """


@dataclass(frozen=True)
class Done:
    """A communication that ran on the caller's stream."""

    def wait(self) -> None:
        """Nothing to wait for: what the caller does from now on is behind it."""


@dataclass(frozen=True)
class StreamPending:
    """A communication on a stream of its own, which `event` ends."""

    event: torch.cuda.Event

    def wait(self) -> None:
        """Order the caller's stream behind it."""
        torch.cuda.current_stream().wait_event(self.event)


class Transport(Protocol):
    """The communication op of one tensor-parallel group.

    All ranks make the same calls in the same order. What a pipeline stage hands over is gathered by
    SGLang's own group and not by the transport (pipeline.py).
    """

    name: str
    rank: int
    world_size: int
    has_copy_engines: bool  # an op beside a computation may come without CTAs
    has_one_shot: bool  # an op of few rows that runs alone may
    has_two_shot: bool  # that of `plan.MOST_TWO_SHOT_TOKENS` is the same with any CTAs

    def allocate(self, capacity: int, hidden_size: int, dtype: torch.dtype) -> SymmetricBuffer:
        """Allocate a buffer of `capacity` rows; a collective call.

        Args:
            dtype: of partial sums and results, or `torch.float8_e4m3fn` for quantized results.
        """

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
        """Start: out := RMSNorm(sum over ranks of slot + residual) * (weight_offset + weight).

        The sum runs in float32 in rank order, so that all ranks hold the same bits. TokenWeave
        (arXiv 2505.11329), section "fused AllReduce-RMSNorm".

        Args:
            slot: `[num_tokens, hidden_size]`; this rank's partial sums.
            residual: `[rows this rank owns, hidden_size]`, of a one-shot op `[num_tokens,
                hidden_size]` alike on all ranks; replaced by the sum. None: no residual.
            weight: `[hidden_size]`.
            eps: added to the mean of squares.
            ctas: thread blocks the op may occupy. 0 beside a computation: none, the copy engines
                move the bytes. 0 alone: one-shot, every rank sends all its rows to all others, up
                to `plan.MOST_ONE_SHOT_TOKENS` of them. A transport without kernels ignores numbers.
            beside: run beside the caller's next computation; otherwise in line with it.
            weight_offset: 1.0 for norms that store their weight less one (Gemma).
            out: where the result goes, the same rows of another buffer; None: it replaces `slot`.
                FP8 rows are quantized each with a scale of its own, its largest magnitude / 448.
        """

    def close(self) -> None:
        """Release threads, groups and memory."""
