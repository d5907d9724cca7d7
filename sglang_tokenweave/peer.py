"""The transport over unicast NVLink: the fused kernel on memory that all ranks have mapped."""

import ctypes
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sglang_tokenweave import compiler
from sglang_tokenweave.agreement import step
from sglang_tokenweave.driver import Kernel
from sglang_tokenweave.kernels import MAX_CTAS, MAX_RANKS, Params, Variant, choose_variant
from sglang_tokenweave.symmetric import PeerMemory
from sglang_tokenweave.transport import Pending, Slot, StreamPending, SymmetricBuffer

DEADLINE_NS = 30 * 10**9  # of one wait on the device, for a rank that is late or gone
# Kernels on two streams may meet their peers in any order, so each stream has signals of its own.
_IN_LINE, _BESIDE = 0, 1
_PAD_BYTES = MAX_CTAS * MAX_RANKS * 4


@dataclass(frozen=True)
class _Done:
    def wait(self) -> None:
        """Nothing to wait for: it ran on the caller's stream."""


class PeerTransport:
    """`allreduce_rmsnorm` by one kernel; see cuda/allreduce_rmsnorm.cu."""

    name = "peer"

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Prepare signals; a collective call over `group`, a CPU group of one host.

        Raises:
            DisagreementError: on all ranks, when memory cannot be shared.
        """
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call] # torch's gap
        self._signals = PeerMemory(2 * _PAD_BYTES, device, group)
        self._epochs = torch.zeros(2, MAX_CTAS, dtype=torch.int32, device=device)
        self._memory: PeerMemory | None = None
        self._buffer: SymmetricBuffer | None = None

    def allocate(self, capacity: int, hidden_size: int, dtype: torch.dtype) -> SymmetricBuffer:
        """Allocate the buffer and compile the kernel for it; a collective call, once.

        Raises:
            ValueError: the kernel does not serve this shape.
            DisagreementError: on all ranks, when memory cannot be shared.
        """
        self._variant = choose_variant(dtype, self.world_size, hidden_size)
        self._kernel = step("compiling", self._group, lambda: _load(self._variant, self._device))
        num_bytes = capacity * hidden_size * dtype.itemsize
        self._memory = PeerMemory(num_bytes, self._device, self._group)
        rows = self._memory.bytes[:num_bytes].view(dtype).view(capacity, hidden_size)
        self._buffer = SymmetricBuffer(rows)
        return self._buffer

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
    ) -> Pending:
        """See `Transport.allreduce_rmsnorm`.

        Raises:
            ValueError: a tensor is not what the kernel takes.
        """
        self._check(slot, residual, weight)
        parameters = self._parameters(slot, residual, weight, eps, weight_offset, beside)
        num_blocks = self._num_blocks(slot.num_tokens, ctas)
        current = torch.cuda.current_stream()
        if not beside:
            self._kernel.launch(current.cuda_stream, num_blocks, parameters)
            return _Done()
        self._stream.wait_stream(current)
        self._kernel.launch(self._stream.cuda_stream, num_blocks, parameters)
        return StreamPending(self._stream.record_event())

    def close(self) -> None:
        """Unmap all memory; a collective call."""
        torch.cuda.synchronize(self._device)
        dist.barrier(self._group)
        for memory in (self._memory, self._signals):
            if memory is not None:
                memory.close()

    def _num_blocks(self, num_tokens: int, ctas: int) -> int:
        """Return an even number of blocks, alike on all ranks, none without a row to work on."""
        share = -(-num_tokens // self.world_size)
        useful = -(-share // self._variant.num_groups)
        return min(ctas, MAX_CTAS, useful + useful % 2)

    def _parameters(
        self,
        slot: Slot,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        beside: bool,
    ) -> Params:
        assert self._memory is not None
        assert self._buffer is not None
        channel = _BESIDE if beside else _IN_LINE
        offset = slot.tensor.data_ptr() - self._buffer.tensor.data_ptr()
        addresses = ctypes.c_uint64 * MAX_RANKS
        signals = [address + channel * _PAD_BYTES for address in self._signals.addresses]
        return Params(
            signals=addresses(*signals),
            epochs=self._epochs[channel].data_ptr(),
            deadline_ns=DEADLINE_NS,
            rank=self.rank,
            x=addresses(*(address + offset for address in self._memory.addresses)),
            residual=0 if residual is None else residual.data_ptr(),
            weight=weight.data_ptr(),
            eps=eps,
            weight_offset=weight_offset,
            num_tokens=slot.num_tokens,
            hidden=slot.tensor.shape[1],
        )

    def _check(self, slot: Slot, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
        owned = slot.owned_rows(self.rank, self.world_size)
        hidden = slot.tensor.shape[1]
        wanted: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {"weight": (weight, (hidden,))}
        if residual is not None:
            wanted["residual"] = (residual, (owned.stop - owned.start, hidden))
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape or tensor.dtype != slot.tensor.dtype:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} {tensor.dtype}; "
                    f"expected {shape} {slot.tensor.dtype}"
                )
            if not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise ValueError(f"{name} must be contiguous and aligned to 16 bytes")


def _load(variant: Variant, device: torch.device) -> Kernel:
    arch = compiler.architecture(*torch.cuda.get_device_capability(device))
    compiled = compiler.compile_kernel("allreduce_rmsnorm.cu", variant.expression, arch)
    return Kernel.load(
        compiled.cubin,
        compiled.name,
        num_threads=variant.num_threads,
        shared_bytes=variant.shared_bytes,
        device=torch.cuda.current_device() if device.index is None else device.index,
    )
