"""Which variant of the kernel serves a shape, and its argument struct."""

import ctypes
from dataclasses import dataclass

import torch

MAX_RANKS = 8
MAX_CTAS = 128
RANKS = (2, 4, 6, 8)
# Of one thread block on sm_90 and sm_100, less what the kernel declares statically.
SHARED_LIMIT_BYTES = 227 * 1024 - 1024
_ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
_VEC_ELEMENTS = 8
_CTA_THREADS = 512  # 128 registers a thread: a row's float32 sums stay in registers


class Params(ctypes.Structure):
    """`Params` of cuda/allreduce_rmsnorm.cu."""

    _fields_ = (
        ("signals", ctypes.c_uint64 * MAX_RANKS),
        ("epochs", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("x", ctypes.c_uint64 * MAX_RANKS),
        ("residual", ctypes.c_uint64),
        ("weight", ctypes.c_uint64),
        ("eps", ctypes.c_float),
        ("weight_offset", ctypes.c_float),
        ("num_tokens", ctypes.c_uint32),
        ("hidden", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Variant:
    """Template arguments of `allreduce_rmsnorm` and what they imply."""

    element: str
    num_ranks: int
    num_vecs: int  # of 8 elements, per thread and row
    num_groups: int  # of threads; each works on a row of its own
    group_threads: int
    num_stages: int  # rows that a group fetches ahead

    @property
    def expression(self) -> str:
        """Return the name of the instantiation in C++."""
        numbers = (
            self.num_ranks,
            self.num_vecs,
            self.num_groups,
            self.group_threads,
            self.num_stages,
        )
        return f"allreduce_rmsnorm<{self.element}, {', '.join(map(str, numbers))}>"

    @property
    def num_threads(self) -> int:
        """Return the threads of a block."""
        return self.num_groups * self.group_threads

    @property
    def shared_bytes(self) -> int:
        """Return the dynamic shared memory of a block: partial and residual rows, by stage."""
        row_bytes = self.num_vecs * self.group_threads * _VEC_ELEMENTS * 2
        return self.num_groups * self.num_stages * (self.num_ranks + 1) * row_bytes


def choose_variant(dtype: torch.dtype, num_ranks: int, hidden_size: int) -> Variant:
    """Return the variant for a shape: as many rows in flight as shared memory holds.

    Raises:
        ValueError: naming what came and what is allowed.
    """
    if dtype not in _ELEMENTS:
        raise ValueError(f"dtype {dtype}: the kernel takes {', '.join(map(str, _ELEMENTS))}")
    if num_ranks not in RANKS:
        raise ValueError(f"{num_ranks} ranks: the kernel is built for {RANKS}")
    if hidden_size % _VEC_ELEMENTS or not 0 < hidden_size <= 16384:
        raise ValueError(f"hidden_size {hidden_size}: it must be a multiple of 8 up to 16384")
    vecs = hidden_size // _VEC_ELEMENTS
    group_threads = next(threads for threads in (128, 256, 512) if vecs <= 4 * threads)
    num_vecs = -(-vecs // group_threads)
    most = _CTA_THREADS // group_threads
    for num_stages, num_groups in ((2, most), (1, most), (1, max(most // 2, 1))):
        variant = Variant(
            _ELEMENTS[dtype], num_ranks, num_vecs, num_groups, group_threads, num_stages
        )
        if variant.shared_bytes <= SHARED_LIMIT_BYTES:
            return variant
    raise ValueError(
        f"hidden_size {hidden_size} on {num_ranks} ranks: one row of all ranks does not fit into "
        f"{SHARED_LIMIT_BYTES} bytes of shared memory"
    )
