"""The transports of the fused kernel: on memory that all ranks have mapped, by NVLink."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sglang_tokenweave.agreement import DisagreementError, step
from sglang_tokenweave.copy_engine import CopyEngine
from sglang_tokenweave.copy_plan import Layout, Region
from sglang_tokenweave.fused import SIGNAL_BYTES, FusedOp, Rows
from sglang_tokenweave.kernels import FP8, choose_variant
from sglang_tokenweave.pushed_rmsnorm import Exchange, PushedGroup
from sglang_tokenweave.symmetric import PeerMemory
from sglang_tokenweave.transport import Done, Pending, Slot, StreamPending, SymmetricBuffer

_IN_LINE, _BESIDE = 0, 1  # channels
_SCALE_BYTES = 4


@dataclass(frozen=True)
class _Region:
    """A buffer and the memory behind it: rows, then the scales of an FP8 buffer."""

    buffer: SymmetricBuffer
    memory: PeerMemory
    copy_engine: CopyEngine | None

    def rows(self, slot: Slot) -> Rows | None:
        """Return `slot` as all ranks' memory has it; None: it is not of this buffer."""
        offset = slot.tensor.data_ptr() - self.buffer.tensor.data_ptr()
        if not 0 <= offset < self.buffer.tensor.nbytes:
            return None
        if slot.scales is None:
            return Rows(slot, self._everywhere(offset), offset=offset)
        scales_offset = slot.scales.data_ptr() - self.buffer.tensor.data_ptr()
        return Rows(slot, self._everywhere(offset), self._everywhere(scales_offset), offset)

    def _everywhere(self, offset: int) -> tuple[int, ...]:
        """Return the addresses, of all ranks' memory, that the kernel takes."""
        multicast = self.memory.multicast_address
        starts = self.memory.addresses if multicast is None else [multicast]
        return tuple(start + offset for start in starts)


class PeerTransport:
    """`allreduce_rmsnorm` by one kernel over unicast addresses, or by the copy engines.

    Each op says which, by its CTAs. The copy engines serve what is reduced in place beside a
    computation; in line, where no SM is to be spared, the kernel is faster.
    """

    name = "peer"
    _is_multicast = False

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        has_copy_engines: bool = False,
        has_one_shot: bool = False,
        has_two_shot: bool = False,
    ) -> None:
        """Prepare signals; a collective call over `group`, a CPU group of one host.

        Args:
            has_copy_engines: whether ops beside a computation may come with 0 CTAs; it costs
                memory as large as the buffers', and a thread.
            has_one_shot: whether ops alone may; it costs three times the memory of the largest
                such batch from every rank.
            has_two_shot: whether ops alone with few rows go without a barrier, whatever their CTAs;
                it costs six times the memory of the largest such batch.

        Raises:
            DisagreementError: on all ranks, when memory cannot be shared.
        """
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        self._device = device
        self.has_copy_engines = has_copy_engines
        self.has_one_shot = has_one_shot
        self.has_two_shot = has_two_shot
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call] # torch's gap
        self._signals = PeerMemory(SIGNAL_BYTES, device, group)
        self._op = FusedOp(
            self.rank,
            self.world_size,
            device,
            self._signals.addresses,
            is_multicast=self._is_multicast,
        )
        self._regions: list[_Region] = []
        self._one_shot: PushedGroup | None = None
        self._two_shot: PushedGroup | None = None

    def allocate(self, capacity: int, hidden_size: int, dtype: torch.dtype) -> SymmetricBuffer:
        """Allocate a buffer and compile the kernels that its rows need; a collective call.

        Raises:
            ValueError: the kernel does not serve this shape.
            DisagreementError: on all ranks, when memory cannot be shared.
        """
        if dtype != FP8:
            # Refuse before anything is made.
            choose_variant(dtype, self.world_size, hidden_size, is_multicast=self._is_multicast)
            pushed = (self._group, self._device, capacity, hidden_size, dtype)
            if self.has_one_shot and self._one_shot is None:
                self._one_shot = PushedGroup(Exchange.ONE_SHOT, *pushed)
            if self.has_two_shot and self._two_shot is None:
                self._two_shot = PushedGroup(Exchange.TWO_SHOT, *pushed)
        row_bytes = hidden_size * dtype.itemsize
        scale_bytes = _SCALE_BYTES if dtype == FP8 else 0
        rows_bytes = capacity * row_bytes
        memory = self._share(rows_bytes + capacity * scale_bytes)
        rows = memory.bytes[:rows_bytes].view(dtype).view(capacity, hidden_size)
        scales = None
        if scale_bytes:
            # 8-bit rows of a multiple of 8: what follows them is aligned for a float.
            scales = memory.bytes[rows_bytes : rows_bytes + capacity * scale_bytes]
            scales = scales.view(torch.float32)
        copy_engine = None
        if self.has_copy_engines and dtype != FP8:
            layout = Layout(self.world_size, capacity, hidden_size, dtype)
            place = Region(self.rank, tuple(memory.addresses), rows_bytes)
            with ExitStack() as stack:
                stack.callback(memory.close)  # if it fails, which it does on all ranks
                copy_engine = CopyEngine.create(self._group, self._device, layout, [place])
                stack.pop_all()
        buffer = SymmetricBuffer(rows, scales)
        self._regions.append(_Region(buffer, memory, copy_engine))
        step("compiling", self._group, self._prepare)
        return buffer

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
        """See `Transport.allreduce_rmsnorm`.

        Raises:
            ValueError: a tensor is not what the kernel takes, or nothing serves this op without
                CTAs.
        """
        to = slot if out is None else out
        if ctas == 0 and not beside:
            if self._one_shot is None:
                raise ValueError("ctas is 0: this transport has no one-shot op, give 2 or more")
            self._one_shot.op.launch(
                slot.tensor, residual, weight, eps, out=to.tensor, weight_offset=weight_offset
            )
            return Done()
        region, x = self._find(slot)
        if ctas == 0:
            if region.copy_engine is None or out is not None:
                raise ValueError("ctas is 0: no copy engine serves this op, give 2 or more")
            return region.copy_engine.allreduce_rmsnorm(
                slot, residual, weight, eps, beside=True, weight_offset=weight_offset
            )
        two_shot = None if beside or self._two_shot is None else self._two_shot.op
        if two_shot is not None and two_shot.takes(slot.tensor, to.tensor):
            two_shot.launch(
                slot.tensor, residual, weight, eps, out=to.tensor, weight_offset=weight_offset
            )
            return Done()
        current = torch.cuda.current_stream()
        stream = self._stream if beside else current
        if beside:
            stream.wait_stream(current)
        self._op.launch(
            x,
            x if out is None else self._find(out)[1],
            residual,
            weight,
            eps,
            weight_offset,
            ctas=ctas,
            channel=_BESIDE if beside else _IN_LINE,
            stream=stream,
            # Beside a computation nobody waits for the launch.
            starts_early=not beside,
        )
        return StreamPending(stream.record_event()) if beside else Done()

    def close(self) -> None:
        """Unmap all memory; a collective call."""
        for pushed in (self._one_shot, self._two_shot):
            if pushed is not None:
                pushed.close()
        torch.cuda.synchronize(self._device)
        dist.barrier(self._group)
        for region in self._regions:
            if region.copy_engine is not None:
                region.copy_engine.close()
            region.memory.close()
        self._signals.close()

    def _share(self, num_bytes: int) -> PeerMemory:
        return PeerMemory(num_bytes, self._device, self._group)

    def _prepare(self) -> None:
        """Compile what the buffers can ask for: each dtype into itself and, with FP8 rows, FP8."""
        kinds = {(r.buffer.tensor.dtype, r.buffer.tensor.shape[1]) for r in self._regions}
        for dtype, hidden_size in kinds:
            for out in {dtype, FP8} if (FP8, hidden_size) in kinds else {dtype}:
                if dtype != FP8:
                    self._op.prepare(dtype, hidden_size, out)

    def _find(self, slot: Slot) -> tuple[_Region, Rows]:
        for region in self._regions:
            rows = region.rows(slot)
            if rows is not None:
                return region, rows
        raise ValueError("the rows are of no buffer of this transport: take them from `allocate`")


class MulticastTransport(PeerTransport):
    """`allreduce_rmsnorm` by one kernel over NVSwitch multicast: the switch adds and copies."""

    name = "multicast"
    _is_multicast = True

    def _share(self, num_bytes: int) -> PeerMemory:
        memory = PeerMemory(num_bytes, self._device, self._group, use_multicast=True)
        if memory.multicast_address is None:
            reason = memory.why_no_multicast
            memory.close()
            raise DisagreementError(f"multicast is not available: {reason}")
        return memory
