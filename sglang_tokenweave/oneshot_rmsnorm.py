"""The op for few rows, by one exchange: variants, argument struct, launch.

See cuda/oneshot_rmsnorm.cu. Unlike the sharded op, it takes and keeps the whole residual, alike on
every rank.
"""

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from sglang_tokenweave.agreement import step
from sglang_tokenweave.deadlines import DEVICE_S
from sglang_tokenweave.kernels import MAX_RANKS
from sglang_tokenweave.loading import load_kernel
from sglang_tokenweave.operands import check_tensor
from sglang_tokenweave.plan import MOST_ONE_SHOT_TOKENS
from sglang_tokenweave.symmetric import PeerMemory

TURNS = 3  # parts of the staging
EMPTY = -(2**15)  # what its 16-bit words hold until somebody writes: -0.0
_STATE_WORDS = 2  # of a block
_ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
_VEC_ELEMENTS = 8
_WARP_THREADS = 32
_MOST_THREADS, _MANY_REGISTERS = 1024, 512  # with several vectors each, threads need them


class Params(ctypes.Structure):
    """`Params` of cuda/oneshot_rmsnorm.cu."""

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


@dataclass(frozen=True)
class Variant:
    """Template arguments of `oneshot_rmsnorm`."""

    element: str
    num_ranks: int
    num_vecs: int  # of 8 elements, per thread
    num_threads: int  # of a block, which has one row

    @property
    def expression(self) -> str:
        """Return the name of the instantiation in C++."""
        return (
            f"oneshot_rmsnorm<{self.element}, {self.num_ranks}, {self.num_vecs}, "
            f"{self.num_threads}>"
        )


def choose_variant(dtype: torch.dtype, num_ranks: int, hidden_size: int) -> Variant:
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
    return Variant(_ELEMENTS[dtype], num_ranks, num_vecs, warps * _WARP_THREADS)


def staging_bytes(capacity: int, num_ranks: int, hidden_size: int) -> int:
    """Return the staging that each rank shares for launches of up to `capacity` rows."""
    return TURNS * num_ranks * capacity * hidden_size * 2


class OneShotOp:
    """One rank's part in launches of up to `capacity` rows. It is told where the staging is."""

    def __init__(
        self,
        rank: int,
        device: torch.device,
        staging: Sequence[int],
        *,
        capacity: int,
        hidden_size: int,
        dtype: torch.dtype,
        deadline_s: float = DEVICE_S,
    ) -> None:
        """Take the addresses of all ranks' staging: `staging_bytes` each, 16-bit words of `EMPTY`.

        Raises:
            ValueError: the kernel does not serve this shape.
            CompileError, CudaError: as the text says.
        """
        variant = choose_variant(dtype, len(staging), hidden_size)
        most = MOST_ONE_SHOT_TOKENS
        if not 1 <= capacity <= most:
            raise ValueError(f"capacity {capacity}: it must be from 1 to {most} rows")
        self.capacity = capacity
        self.hidden_size = hidden_size
        self.dtype = dtype
        self._rank = rank
        self._staging = (ctypes.c_uint64 * MAX_RANKS)(*staging)
        self._deadline_ns = int(deadline_s * 1e9)
        states = (capacity, _STATE_WORDS)
        self._states = torch.zeros(states, dtype=torch.int32, device=device)
        self._kernel = load_kernel(
            "oneshot_rmsnorm.cu", variant.expression, device, num_threads=variant.num_threads
        )

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
            residual: `[num_rows, hidden_size]`, alike on all ranks, replaced by the sum.
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
            capacity=self.capacity,
            num_rows=x.shape[0],
            hidden=self.hidden_size,
            eps=eps,
            weight_offset=weight_offset,
        )
        stream = torch.cuda.current_stream().cuda_stream
        blocks = x.shape[0]
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
            check_tensor("residual", residual, rows, self.dtype)


class OneShotGroup:
    """The op on the ranks of a group, over memory that all of them have mapped."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        capacity: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """Share staging and load the kernel; a collective call over a CPU group of one host.

        Raises:
            ValueError: the kernel does not serve this shape.
            DisagreementError: on all ranks, when memory cannot be shared or no kernel be made.
        """
        world_size = dist.get_world_size(group)
        choose_variant(dtype, world_size, hidden_size)  # refuse before anything is made
        num_bytes = staging_bytes(capacity, world_size, hidden_size)
        self._group = group
        self._device = device
        self._memory = PeerMemory(num_bytes, device, group)
        self._memory.bytes[:num_bytes].view(torch.int16).fill_(EMPTY)
        torch.cuda.synchronize(device)
        make = partial(
            OneShotOp,
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
