"""The copy engines' kernel on a rank's own rows: its variants, its argument struct, its launch."""

import ctypes
from dataclasses import dataclass

import torch

from sglang_tokenweave import driver
from sglang_tokenweave.kernels import FP8, MAX_RANKS

_ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
_VEC_ELEMENTS = 8
_MAX_VECS = 4  # of a thread: their float32 sums stay in registers


class Params(ctypes.Structure):
    """`Params` of cuda/add_rmsnorm.cu."""

    _fields_ = (
        ("parts", ctypes.c_uint64 * MAX_RANKS),
        ("residual", ctypes.c_uint64),
        ("weight", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("scales", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("watched", ctypes.c_uint64),
        ("next_phase", ctypes.c_uint32),
        ("num_ops", ctypes.c_uint32),
        ("eps", ctypes.c_float),
        ("weight_offset", ctypes.c_float),
        ("num_rows", ctypes.c_uint32),
        ("hidden", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Variant:
    """Template arguments of `add_rmsnorm`."""

    element: str
    is_fp8: bool  # the result
    num_ranks: int
    num_vecs: int  # of 8 elements, per thread
    num_threads: int  # of a block, which has one row

    @property
    def expression(self) -> str:
        """Return the name of the instantiation in C++."""
        numbers = f"{self.num_ranks}, {self.num_vecs}, {self.num_threads}"
        return f"add_rmsnorm<{self.element}, {str(self.is_fp8).lower()}, {numbers}>"


def choose_variant(
    dtype: torch.dtype, out_dtype: torch.dtype, num_ranks: int, hidden_size: int
) -> Variant:
    """Return the variant for a shape; `out_dtype` is `dtype` or FP8.

    Raises:
        ValueError: naming what came and what is allowed.
    """
    if dtype not in _ELEMENTS:
        raise ValueError(f"dtype {dtype}: the kernel takes {', '.join(map(str, _ELEMENTS))}")
    if out_dtype not in (dtype, FP8):
        raise ValueError(f"the result is to be {out_dtype}; the kernel writes {dtype} or {FP8}")
    if not 2 <= num_ranks <= MAX_RANKS:
        raise ValueError(f"{num_ranks} ranks: the kernel is built for 2 to {MAX_RANKS}")
    if hidden_size % _VEC_ELEMENTS or not 0 < hidden_size <= 16384:
        raise ValueError(f"hidden_size {hidden_size}: it must be a multiple of 8 up to 16384")
    vecs = hidden_size // _VEC_ELEMENTS
    threads = next(threads for threads in (128, 256, 512) if vecs <= _MAX_VECS * threads)
    num_vecs = -(-vecs // threads)
    return Variant(_ELEMENTS[dtype], out_dtype == FP8, num_ranks, num_vecs, threads)


def launch(
    kernel: driver.Kernel, stream: int, num_blocks: int, parameters: ctypes.Structure
) -> None:
    """Launch blocks one by one: clusters, which `Kernel.launch` makes, help only CTAs that stay."""
    # The driver copies the struct before it returns.
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
    grid, block = (num_blocks, 1, 1), (kernel.num_threads, 1, 1)
    arguments = ctypes.addressof(pointers)
    driver.call("cuLaunchKernel", kernel.function, *grid, *block, 0, stream, arguments, 0)
