"""The op for few rows, which ranks push to each other: variants, argument struct, launch.

See cuda/oneshot_rmsnorm.cu and cuda/twoshot_rmsnorm.cu. By one exchange everybody adds up all rows,
and keeps the whole residual, alike on every rank. By two, each adds up its share, as the sharded op
does, and keeps that share's residual.
"""

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
import torch.distributed as dist

from sglang_tokenweave.agreement import step
from sglang_tokenweave.deadlines import DEVICE_S
from sglang_tokenweave.kernels import MAX_RANKS
from sglang_tokenweave.loading import load_kernel
from sglang_tokenweave.operands import check_tensor
from sglang_tokenweave.plan import MOST_ONE_SHOT_TOKENS, MOST_TWO_SHOT_TOKENS
from sglang_tokenweave.symmetric import PeerMemory
from sglang_tokenweave.transport import owned_rows

_TURNS = 3  # parts of the staging
EMPTY = -(2**15)  # what its 16-bit words hold until somebody writes: -0.0
_STATE_WORDS = 2  # of a block
_ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
_VEC_ELEMENTS = 8
_WARP_THREADS = 32
_MOST_THREADS, _MANY_REGISTERS = 1024, 512  # with several vectors each, threads need them


class Params(ctypes.Structure):
    """`Params` of cuda/pushed_rows.cuh."""

    _fields_ = (
        ("staging", ctypes.c_uint64 * MAX_RANKS),
        ("x", ctypes.c_uint64),
        ("residual", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("weight", ctypes.c_uint64),
        ("states", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("capacity", ctypes.c_uint32),
        ("num_rows", ctypes.c_uint32),
        ("hidden", ctypes.c_uint32),
        ("eps", ctypes.c_float),
        ("weight_offset", ctypes.c_float),
    )


class Exchange(Enum):
    """How ranks push rows to each other; the value is the kernel's name."""

    ONE_SHOT = "oneshot_rmsnorm"
    TWO_SHOT = "twoshot_rmsnorm"

    @property
    def most_rows(self) -> int:
        """Return the rows of the largest launch: staging for more is not worth its memory."""
        return MOST_ONE_SHOT_TOKENS if self is Exchange.ONE_SHOT else MOST_TWO_SHOT_TOKENS

    def num_slots(self, num_rows: int, num_ranks: int) -> int:
        """Return the rows that a rank sends to each other one: a launch has a block for each."""
        return num_rows if self is Exchange.ONE_SHOT else _ceil_div(num_rows, num_ranks)

    def owned(self, num_rows: int, rank: int, num_ranks: int) -> slice:
        """Return the rows that a rank adds up, and whose residual it keeps."""
        if self is Exchange.ONE_SHOT:
            return slice(0, num_rows)
        return owned_rows(num_rows, rank, num_ranks)

    def staging_bytes(self, capacity: int, num_ranks: int, hidden_size: int) -> int:
        """Return the staging that each rank shares for launches of up to `capacity` rows."""
        stagings = 1 if self is Exchange.ONE_SHOT else 2  # the second one for results
        slots = self.num_slots(capacity, num_ranks)
        return stagings * _TURNS * num_ranks * slots * hidden_size * 2


@dataclass(frozen=True)
class Variant:
    """Template arguments of a kernel."""

    exchange: Exchange
    element: str
    num_ranks: int
    num_vecs: int  # of 8 elements, per thread
    num_threads: int  # of a block, which has one row of a share

    @property
    def expression(self) -> str:
        """Return the name of the instantiation in C++."""
        return (
            f"{self.exchange.value}<{self.element}, {self.num_ranks}, {self.num_vecs}, "
            f"{self.num_threads}>"
        )


def choose_variant(
    exchange: Exchange, dtype: torch.dtype, num_ranks: int, hidden_size: int
) -> Variant:
    """Return the variant for a shape: as many threads as a row has vectors, to a full block.

    Raises:
        ValueError: naming what came and what is allowed.
    """
    if dtype not in _ELEMENTS:
        raise ValueError(f"dtype {dtype}: the kernel takes {', '.join(map(str, _ELEMENTS))}")
    if not 2 <= num_ranks <= MAX_RANKS:
        raise ValueError(f"{num_ranks} ranks: the kernel is built for 2 to {MAX_RANKS}")
    if hidden_size % _VEC_ELEMENTS or not 0 < hidden_size <= 16384:
        raise ValueError(f"hidden_size {hidden_size}: it must be a multiple of 8 up to 16384")
    vecs = hidden_size // _VEC_ELEMENTS
    most = _MOST_THREADS if vecs <= _MOST_THREADS else _MANY_REGISTERS
    num_vecs = _ceil_div(vecs, most)
    warps = _ceil_div(vecs, num_vecs * _WARP_THREADS)
    return Variant(exchange, _ELEMENTS[dtype], num_ranks, num_vecs, warps * _WARP_THREADS)


class PushedOp:
    """One rank's part in launches of up to `capacity` rows. It is told where the staging is."""

    def __init__(
        self,
        exchange: Exchange,
        rank: int,
        device: torch.device,
        staging: Sequence[int],
        *,
        capacity: int,
        hidden_size: int,
        dtype: torch.dtype,
        deadline_s: float = DEVICE_S,
    ) -> None:
        """Take the addresses of all ranks' staging: 16-bit words of `EMPTY`.

        Raises:
            ValueError: the kernel does not serve this shape.
            CompileError, CudaError: as the text says.
        """
        variant = choose_variant(exchange, dtype, len(staging), hidden_size)
        most = exchange.most_rows
        if not 1 <= capacity <= most:
            raise ValueError(f"capacity {capacity}: it must be from 1 to {most} rows")
        self.exchange = exchange
        self.capacity = capacity
        self.hidden_size = hidden_size
        self.dtype = dtype
        self._rank, self._num_ranks = rank, len(staging)
        self._num_slots = exchange.num_slots(capacity, len(staging))
        self._staging = (ctypes.c_uint64 * MAX_RANKS)(*staging)
        self._deadline_ns = int(deadline_s * 1e9)
        states = (self._num_slots, _STATE_WORDS)
        self._states = torch.zeros(states, dtype=torch.int32, device=device)
        self._kernel = load_kernel(
            f"{exchange.value}.cu", variant.expression, device, num_threads=variant.num_threads
        )

    def takes(self, x: torch.Tensor, out: torch.Tensor) -> bool:
        """Return whether `launch` serves rows like these, and such results."""
        fits = x.shape[0] <= self.capacity and x.shape[1] == self.hidden_size
        return fits and x.dtype == out.dtype == self.dtype

    def launch(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        out: torch.Tensor | None = None,
        weight_offset: float = 0.0,
    ) -> torch.Tensor:
        """Return out := RMSNorm(sum over ranks of x + residual) * (weight_offset + weight).

        Enqueued on the current stream, one launch after another; capturable in a CUDA graph. All
        ranks make the same launches.

        Args:
            x: `[num_rows, hidden_size]`, this rank's partial sums.
            residual: `[num_rows, hidden_size]`, alike on all ranks, or this rank's share of the
                rows; replaced by the sum.
            weight: `[hidden_size]`.
            eps: added to the mean of squares.
            out: where the result goes; None: a new tensor. It may be `x`.
            weight_offset: 1.0 for norms that store their weight less one (Gemma).

        Raises:
            ValueError: a tensor is not what the kernel takes, or has too many rows.
        """
        out = torch.empty_like(x) if out is None else out
        self._check(x, residual, weight, out)
        parameters = Params(
            staging=self._staging,
            x=x.data_ptr(),
            residual=0 if residual is None else residual.data_ptr(),
            out=out.data_ptr(),
            weight=weight.data_ptr(),
            states=self._states.data_ptr(),
            deadline_ns=self._deadline_ns,
            rank=self._rank,
            capacity=self._num_slots,
            num_rows=x.shape[0],
            hidden=self.hidden_size,
            eps=eps,
            weight_offset=weight_offset,
        )
        stream = torch.cuda.current_stream().cuda_stream
        blocks = self.exchange.num_slots(x.shape[0], self._num_ranks)
        self._kernel.launch(stream, blocks, parameters, in_pairs=False, starts_early=True)
        return out

    def _check(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        num_rows = x.shape[0]
        if not 1 <= num_rows <= self.capacity:
            raise ValueError(f"{num_rows} rows: the staging is for 1 to {self.capacity}")
        rows = (num_rows, self.hidden_size)
        check_tensor("x", x, rows, self.dtype)
        check_tensor("out", out, rows, self.dtype)
        check_tensor("weight", weight, (self.hidden_size,), self.dtype)
        if residual is not None:
            owned = self.exchange.owned(num_rows, self._rank, self._num_ranks)
            shape = (owned.stop - owned.start, self.hidden_size)
            check_tensor("residual", residual, shape, self.dtype)


class PushedGroup:
    """The op on the ranks of a group, over memory that all of them have mapped."""

    def __init__(
        self,
        exchange: Exchange,
        group: dist.ProcessGroup,
        device: torch.device,
        capacity: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """Share staging and load the kernel; a collective call over a CPU group of one host.

        `capacity` is as of `PushedOp`, and as much as the exchange is for where it is more.

        Raises:
            ValueError: the kernel does not serve this shape.
            DisagreementError: on all ranks, when memory cannot be shared or no kernel be made.
        """
        world_size = dist.get_world_size(group)
        choose_variant(exchange, dtype, world_size, hidden_size)  # before anything is made
        capacity = min(capacity, exchange.most_rows)
        num_bytes = exchange.staging_bytes(capacity, world_size, hidden_size)
        self._group = group
        self._device = device
        self._memory = PeerMemory(num_bytes, device, group)
        self._memory.bytes[:num_bytes].view(torch.int16).fill_(EMPTY)
        torch.cuda.synchronize(device)
        make = partial(
            PushedOp,
            exchange,
            dist.get_rank(group),
            device,
            self._memory.addresses,
            capacity=capacity,
            hidden_size=hidden_size,
            dtype=dtype,
        )
        with ExitStack() as stack:
            stack.callback(self._memory.close)
            self.op = step("compiling", group, make)  # nobody sends before all are empty
            stack.pop_all()

    def close(self) -> None:
        """Unmap the staging; a collective call."""
        torch.cuda.synchronize(self._device)
        dist.barrier(self._group)
        self._memory.close()


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
