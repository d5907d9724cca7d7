"""Which variant of the kernel serves a shape, and its argument struct."""

import ctypes
from dataclasses import dataclass

import torch

MAX_RANKS = 8
MAX_CTAS = 128
RANKS = (2, 4, 6, 8)
SHARED_LIMIT_BYTES = 227 * 1024  # of one thread block on sm_90 and sm_100; 99 KiB on sm_120
_STATIC_BYTES = 1024  # what the kernel declares itself, and more
FP8 = torch.float8_e4m3fn
_ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
_VEC_ELEMENTS = 8
_WARP_THREADS = 32
_MAX_GROUPS = 8
# Per thread, and threads per block, of which each then has 128 registers: a row's float32 sums and
# the gain stay there. 1024 threads of two would share what a row costs among half the elements.
_NUM_VECS, _MOST_THREADS = 4, 512


class Params(ctypes.Structure):
    """`Params` of cuda/allreduce_rmsnorm.cu."""

    _fields_ = (
        ("signals", ctypes.c_uint64 * MAX_RANKS),
        ("epochs", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("digest", ctypes.c_uint32),
        ("x", ctypes.c_uint64 * MAX_RANKS),
        ("out", ctypes.c_uint64 * MAX_RANKS),
        ("scales", ctypes.c_uint64 * MAX_RANKS),
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
    num_stages: int  # pieces of rows that a group fetches ahead
    is_multicast: bool = False
    is_fp8: bool = False  # the result; what comes in is of `element`
    is_exact: bool = False  # a group's threads have exactly a row's vecs

    @property
    def expression(self) -> str:
        """Return the name of the instantiation in C++."""
        transport = f"{'Multicast' if self.is_multicast else 'Peer'}<{self.num_ranks}>"
        numbers = (self.num_vecs, self.num_groups, self.group_threads, self.num_stages)
        return (
            f"allreduce_rmsnorm<{self.element}, {transport}, {self.num_ranks}, "
            f"{_bool(self.is_fp8)}, {', '.join(map(str, numbers))}, {_bool(self.is_exact)}>"
        )

    @property
    def num_threads(self) -> int:
        """Return the threads of a block."""
        return self.num_groups * self.group_threads

    @property
    def stage_bytes(self) -> int:
        """Return what one piece takes of a group's shared memory: one addend of one row."""
        return self.num_vecs * self.group_threads * _VEC_ELEMENTS * 2

    @property
    def shared_bytes(self) -> int:
        """Return the dynamic shared memory of a block."""
        return self.num_groups * self.num_stages * self.stage_bytes


def choose_variant(
    dtype: torch.dtype,
    num_ranks: int,
    hidden_size: int,
    *,
    is_multicast: bool = False,
    is_fp8: bool = False,
    has_one_group: bool = False,
    shared_limit_bytes: int = SHARED_LIMIT_BYTES,
) -> Variant:
    """Return the variant for a shape: one row's pieces in flight, as far as memory holds them.

    More reads under way are no faster where the SMs are the limit, and where the link is, they hold
    up the results that cross it the other way (docs/communication.md).

    Args:
        dtype: of what comes in.
        is_fp8: the result is FP8.
        has_one_group: for batches of at most one row per block, which smaller blocks do faster.
        shared_limit_bytes: what a thread block may have on the device.

    Raises:
        ValueError: naming what came and what is allowed.
    """
    if dtype not in _ELEMENTS:
        raise ValueError(f"dtype {dtype}: the kernel takes {', '.join(map(str, _ELEMENTS))}")
    if num_ranks not in RANKS:
        raise ValueError(f"{num_ranks} ranks: the kernel is built for {RANKS}")
    if hidden_size % _VEC_ELEMENTS or not 0 < hidden_size <= 16384:
        raise ValueError(f"hidden_size {hidden_size}: it must be a multiple of 8 up to 16384")
    vecs_per_warp = _NUM_VECS * _WARP_THREADS
    group_threads = -(-(hidden_size // _VEC_ELEMENTS) // vecs_per_warp) * _WARP_THREADS
    num_groups = 1 if has_one_group else min(_MOST_THREADS // group_threads, _MAX_GROUPS)
    stage_bytes = num_groups * _NUM_VECS * group_threads * _VEC_ELEMENTS * 2
    # Where the fabric adds, only the residual is fetched, and two rows ahead.
    most = 2 if is_multicast else num_ranks + 1
    num_stages = min(most, (shared_limit_bytes - _STATIC_BYTES) // stage_bytes)
    return Variant(
        _ELEMENTS[dtype],
        num_ranks,
        _NUM_VECS,
        num_groups,
        group_threads,
        num_stages,
        is_multicast,
        is_fp8,
        is_exact=_NUM_VECS * group_threads * _VEC_ELEMENTS == hidden_size,
    )


def _bool(value: bool) -> str:
    """Return it as C++ spells it."""
    return str(value).lower()
