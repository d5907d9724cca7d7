"""The fused kernel of one rank: compile, check, launch. It is told where the memory is."""

import ctypes
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sglang_tokenweave.deadlines import DEVICE_S
from sglang_tokenweave.driver import Kernel, shared_limit_bytes
from sglang_tokenweave.kernels import FP8, MAX_CTAS, MAX_RANKS, Params, Variant, choose_variant
from sglang_tokenweave.loading import load_kernel, ordinal
from sglang_tokenweave.operands import check_tensor
from sglang_tokenweave.transport import Slot

# Kernels on two streams may meet their peers in any order, so each stream has signals of its own.
NUM_CHANNELS = 2
_PAD_BYTES = MAX_CTAS * MAX_RANKS * 8
SIGNAL_BYTES = NUM_CHANNELS * _PAD_BYTES


@dataclass(frozen=True)
class Rows:
    """Rows of a symmetric buffer, as one rank reaches them.

    `addresses` has one address per rank or, for a multicast kernel, the multicast address alone;
    `scales` likewise, for an FP8 buffer.
    """

    slot: Slot
    addresses: tuple[int, ...]
    scales: tuple[int, ...] = ()
    offset: int = 0  # of the first row in its buffer, in bytes: alike on all ranks


class FusedOp:
    """`allreduce_rmsnorm` by one kernel; see cuda/allreduce_rmsnorm.cu."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        signals: Sequence[int],
        *,
        is_multicast: bool = False,
        deadline_s: float = DEVICE_S,
    ) -> None:
        """Take the addresses of all ranks' signals: `SIGNAL_BYTES` of zeros each."""
        self.rank = rank
        self.world_size = world_size
        self._device = device
        self._signals = tuple(signals)
        self._is_multicast = is_multicast
        self._deadline_ns = int(deadline_s * 1e9)
        self._epochs = torch.zeros(NUM_CHANNELS, MAX_CTAS, dtype=torch.int32, device=device)
        self._shared_limit_bytes = shared_limit_bytes(ordinal(device))
        self._kernels: dict[Variant, Kernel] = {}

    def prepare(self, dtype: torch.dtype, hidden_size: int, out: torch.dtype) -> None:
        """Compile and load: before the first launch, and never while a graph is captured.

        Args:
            dtype: of the partial sums.
            out: of the results: `dtype` or FP8.

        Raises:
            ValueError: the kernel does not serve this shape.
            CompileError, CudaError: as the text says.
        """
        for variant in self._variants(dtype, hidden_size, out):
            if variant not in self._kernels:
                self._kernels[variant] = load_kernel(
                    "allreduce_rmsnorm.cu",
                    variant.expression,
                    self._device,
                    num_threads=variant.num_threads,
                    shared_bytes=variant.shared_bytes,
                )

    def _variants(
        self, dtype: torch.dtype, hidden_size: int, out: torch.dtype
    ) -> tuple[Variant, Variant]:
        """Return those for at most one row per block, and for more."""
        if out not in (dtype, FP8):
            raise ValueError(f"the result is to be {out}; the kernel writes {dtype} or {FP8}")
        choose = partial(
            choose_variant,
            dtype,
            self.world_size,
            hidden_size,
            is_multicast=self._is_multicast,
            is_fp8=out == FP8,
            shared_limit_bytes=self._shared_limit_bytes,
        )
        return choose(has_one_group=True), choose()

    def launch(
        self,
        x: Rows,
        out: Rows,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        *,
        ctas: int,
        channel: int,
        stream: torch.cuda.Stream,
        starts_early: bool = False,
    ) -> None:
        """Launch out := RMSNorm(sum over ranks of x + residual) * (weight_offset + weight).

        Launches on one channel run one after another; those on two may run at the same time.

        Args:
            starts_early: beside the end of the kernel before it on the stream, for which it waits.

        Raises:
            ValueError: a tensor is not what the kernel takes.
        """
        self._check(x.slot, out.slot, residual, weight)
        dtype, hidden = x.slot.tensor.dtype, x.slot.tensor.shape[1]
        variants = self._variants(dtype, hidden, out.slot.tensor.dtype)
        variant, num_blocks = choose_grid(variants, x.slot.num_tokens, ctas)
        numbers = (eps, weight_offset, x.slot.num_tokens, hidden)
        alike = (*numbers, x.offset, out.offset, num_blocks, residual is not None, variant.is_fp8)
        parameters = Params(
            signals=_addresses([pad + channel * _PAD_BYTES for pad in self._signals]),
            epochs=self._epochs[channel].data_ptr(),
            deadline_ns=self._deadline_ns,
            rank=self.rank,
            digest=zlib.crc32(struct.pack("<2d7q", *alike)),
            x=_addresses(x.addresses),
            out=_addresses(out.addresses),
            scales=_addresses(out.scales),
            residual=0 if residual is None else residual.data_ptr(),
            weight=weight.data_ptr(),
            eps=eps,
            weight_offset=weight_offset,
            num_tokens=x.slot.num_tokens,
            hidden=hidden,
        )
        kernel = self._kernels[variant]
        kernel.launch(stream.cuda_stream, num_blocks, parameters, starts_early=starts_early)

    def _check(
        self, x: Slot, out: Slot, residual: torch.Tensor | None, weight: torch.Tensor
    ) -> None:
        hidden, dtype = x.tensor.shape[1], x.tensor.dtype
        if out.tensor.shape != x.tensor.shape:
            raise ValueError(
                f"the result's rows are {tuple(out.tensor.shape)}; expected {tuple(x.tensor.shape)}"
            )
        if (out.scales is None) == (out.tensor.dtype == FP8):
            raise ValueError(
                f"rows of {out.tensor.dtype}: only FP8 rows have scales, and they must"
            )
        check_tensor("weight", weight, (hidden,), dtype)
        if residual is not None:
            owned = x.owned_rows(self.rank, self.world_size)
            check_tensor("residual", residual, (owned.stop - owned.start, hidden), dtype)


def choose_grid(
    variants: tuple[Variant, Variant], num_tokens: int, ctas: int
) -> tuple[Variant, int]:
    """Return the variant and an even number of blocks, at most `ctas`: none without work."""
    small, large = variants
    share = -(-num_tokens // small.num_ranks)
    ctas = min(ctas, MAX_CTAS)
    variant = small if share <= ctas else large
    useful = -(-share // variant.num_groups)
    return variant, min(ctas, useful + useful % 2)


def _addresses(values: Sequence[int]) -> "ctypes.Array[ctypes.c_uint64]":
    return (ctypes.c_uint64 * MAX_RANKS)(*values)
