"""The interface of what is timed, the buffers it works on, and the check against float64."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.cases import Case

EPS = 1e-5
_CHECKED_ROWS = 2048  # at once, to bound what float64 takes of memory


class Absent(RuntimeError):
    """A variant cannot run here; the text says why."""


@dataclass(frozen=True)
class Buffer:
    """What one call works on."""

    x: torch.Tensor  # [tokens, hidden], this rank's partial sums
    residual: torch.Tensor | None = None  # [rows, hidden]
    first_row: int = 0  # of the whole residual, in `residual`


@dataclass(frozen=True)
class Output:
    """What one call leaves, as views of whatever it wrote."""

    x: torch.Tensor  # [tokens, hidden]
    residual: torch.Tensor | None = None  # [rows, hidden]


class Variant(ABC):
    """One way to do the op, or a part of it. All ranks make the same calls in the same order."""

    name: str
    with_norm: bool = True  # else it only sums over the ranks
    uses_multicast: ClassVar[bool] = False
    computes: ClassVar[bool] = True  # else it only moves bytes, and there is no result to check
    roundings: int = 1  # of a value to the tensor's type on its way; see `tolerance`

    def refuses(self, case: Case) -> str | None:
        """Return why it does not do this size, or None if it does."""
        return None

    @abstractmethod
    def buffers(self, case: Case, count: int) -> list[Buffer]:
        """Return `count` buffers; they may be shared with other variants."""

    @abstractmethod
    def run(self, buffer: Buffer) -> Output:
        """Enqueue the op on the current stream."""

    def capturing(self) -> AbstractContextManager[Any]:
        """Return what must be held open while `run` is captured in a CUDA graph."""
        return nullcontext()

    def close(self) -> None:  # noqa: B027 - most variants hold nothing of their own
        """Release what is not shared; a collective call."""


@dataclass(frozen=True)
class Inputs:
    """Random inputs that every rank can draw for all ranks: partial sums, residual, weight."""

    world_size: int
    hidden: int
    dtype: torch.dtype
    device: torch.device

    def weight(self) -> torch.Tensor:
        """Return `[hidden]`, around 1."""
        return (1 + 0.1 * self._normal("weight", 1)[0]).to(self.dtype)

    def partial(self, seed: tuple[int, int], rank: int, tokens: int) -> torch.Tensor:
        """Return the partial sums of a rank, `[tokens, hidden]`."""
        return self._normal((*seed, rank), tokens).to(self.dtype)

    def residual(self, seed: tuple[int, int], tokens: int) -> torch.Tensor:
        """Return the whole residual, `[tokens, hidden]`."""
        return self._normal((*seed, "residual"), tokens).to(self.dtype)

    def fill(self, buffer: Buffer, seed: tuple[int, int], rank: int) -> None:
        """Give a buffer fresh inputs."""
        tokens = buffer.x.shape[0]
        buffer.x.copy_(self.partial(seed, rank, tokens))
        if buffer.residual is not None:
            last = buffer.first_row + buffer.residual.shape[0]
            buffer.residual.copy_(self.residual(seed, tokens)[buffer.first_row : last])

    def error(
        self, variant: Variant, buffer: Buffer, output: Output, seed: tuple[int, int]
    ) -> float:
        """Return the largest relative error of a row of the output or the residual.

        Relative to the row's length, against float64 from the same inputs; NaN if any is.
        """
        errors = [0.0]
        first = buffer.first_row
        for rows, total in self._totals(variant, seed, buffer.x.shape[0]):
            expected = total
            if variant.with_norm:
                scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
                expected = total * scale * self.weight().double()
            errors.append(_row_error(output.x[rows], expected))
            if output.residual is not None:
                last = first + output.residual.shape[0]
                held = slice(max(rows.start, first), max(min(rows.stop, last), first))
                errors.append(
                    _row_error(
                        _shift(output.residual, held, first), _shift(total, held, rows.start)
                    )
                )
        return max(errors) if all(error == error for error in errors) else float("nan")

    def _totals(
        self, variant: Variant, seed: tuple[int, int], tokens: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield, by blocks of rows, the float64 sums over ranks and, if it adds one, residual."""
        terms = [self.partial(seed, rank, tokens) for rank in range(self.world_size)]
        if variant.with_norm:
            terms.append(self.residual(seed, tokens))
        for start in range(0, tokens, _CHECKED_ROWS):
            rows = slice(start, min(start + _CHECKED_ROWS, tokens))
            total = terms[0][rows].double()
            for term in terms[1:]:
                total += term[rows]
            yield rows, total

    def _normal(self, seed: object, rows: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(_number(seed))
        return torch.randn(rows, self.hidden, generator=generator, device=self.device)


def tolerance(dtype: torch.dtype, roundings: int) -> float:
    """Return the relative error allowed of a row.

    One rounding leaves 0.22 of the type's epsilon (1.7e-3 in bf16, seen on random data); twice
    that is allowed, and independent roundings add as squares.
    """
    return 0.5 * torch.finfo(dtype).eps * math.sqrt(roundings)


def _row_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    if value.numel() == 0:  # a rank may own no row
        return 0.0
    difference = torch.linalg.vector_norm(value.double() - expected, dim=-1)
    lengths = torch.linalg.vector_norm(expected, dim=-1)
    worst: float = (difference / lengths.clamp_min(1e-12)).max().item()
    return worst


def _shift(rows: torch.Tensor, held: slice, first: int) -> torch.Tensor:
    """Return rows `held` of the whole out of those that begin at row `first` of it."""
    return rows[held.start - first : max(held.stop, held.start) - first]


def _number(seed: object) -> int:
    """Return a seed that is the same in every process, unlike `hash`."""
    number = 0
    for character in repr(seed):
        number = (number * 1_000_003 + ord(character)) % 2**63
    return number
