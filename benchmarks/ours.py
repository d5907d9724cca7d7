"""The project's own variants, and the floor that they are held against."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from benchmarks.cases import FLOOR_BYTES, Case
from benchmarks.variant import EPS, Absent, Buffer, Output, Variant
from benchmarks.workbench import Place, Workbench
from sglang_tokenweave import driver
from sglang_tokenweave.copy_engine import CopyEngine
from sglang_tokenweave.copy_plan import Layout, Region
from sglang_tokenweave.pushed_rmsnorm import Exchange, PushedGroup
from sglang_tokenweave.symmetric import PeerMemory
from sglang_tokenweave.transport import Slot, SymmetricBuffer, Transport

FUSED_CTAS = (2, 4, 8, 16, 32)
_EXCHANGES = {"push": Exchange.ONE_SHOT, "push_twice": Exchange.TWO_SHOT}


class Ours(Variant):
    """What works in place on rows of a symmetric buffer, the residual sharded over the ranks."""

    def __init__(self, bench: Workbench, name: str, memory: SymmetricBuffer) -> None:
        self.name = name
        self.bench = bench
        self._memory = memory

    def buffers(self, case: Case, count: int) -> list[Buffer]:
        place, tokens = self.bench.place, case.tokens
        owned = self._memory.slot(0, tokens).owned_rows(place.rank, place.world_size)
        rows = owned.stop - owned.start
        return [
            Buffer(
                self._memory.tensor[start : start + tokens],
                self.bench.residual[start : start + rows],
                owned.start,
            )
            for start in range(0, count * tokens, tokens)
        ]

    def run(self, buffer: Buffer) -> Output:
        rows = buffer.x.data_ptr() - self._memory.tensor.data_ptr()
        start = rows // (self.bench.hidden * buffer.x.element_size())
        self.launch(self._memory.slot(start, start + buffer.x.shape[0]), buffer.residual)
        return Output(buffer.x, buffer.residual)

    @abstractmethod
    def launch(self, slot: Slot, residual: torch.Tensor | None) -> None:
        """Enqueue it on the current stream."""


class Fused(Ours):
    """The fused kernel on so many thread blocks, over unicast addresses."""

    def __init__(self, bench: Workbench, name: str) -> None:
        self._transport, memory = self.transport(bench)
        self._ctas = int(name.partition("/")[2])
        super().__init__(bench, name, memory)

    def transport(self, bench: Workbench) -> tuple[Transport, SymmetricBuffer]:
        """Return the transport, shared by all counts of thread blocks, and its buffer."""
        return bench.transport

    def launch(self, slot: Slot, residual: torch.Tensor | None) -> None:
        weight = self.bench.weight
        self._transport.allreduce_rmsnorm(
            slot, residual, weight, EPS, ctas=self._ctas, beside=False
        ).wait()


class Multicast(Fused):
    """The same by NVSwitch multicast."""

    uses_multicast = True

    def transport(self, bench: Workbench) -> tuple[Transport, SymmetricBuffer]:
        return bench.multicast_transport


class CopyEngines(Ours):
    """The copy engines move the bytes; a short kernel normalises."""

    def __init__(self, bench: Workbench, name: str) -> None:
        place = bench.place
        num_bytes = bench.capacity * bench.hidden * bench.dtype.itemsize
        memory = PeerMemory(num_bytes, place.device, place.group)
        bench.on_close(memory.close)
        rows = memory.bytes[:num_bytes].view(bench.dtype).view(bench.capacity, bench.hidden)
        layout = Layout(place.world_size, bench.capacity, bench.hidden, bench.dtype)
        region = Region(place.rank, tuple(memory.addresses), num_bytes)
        self._engine = CopyEngine.create(place.group, place.device, layout, [region])
        bench.on_close(self._engine.close)
        super().__init__(bench, name, SymmetricBuffer(rows))

    def launch(self, slot: Slot, residual: torch.Tensor | None) -> None:
        self._engine.allreduce_rmsnorm(slot, residual, self.bench.weight, EPS, beside=False).wait()


class Push(Variant):
    """One exchange in which every rank sends all its rows to all, or two of shares."""

    def __init__(self, bench: Workbench, name: str) -> None:
        self.name = name
        self.bench = bench
        self._exchange = _EXCHANGES[name]
        place = bench.place
        self._group = PushedGroup(
            self._exchange,
            place.group,
            place.device,
            bench.max_tokens,
            bench.hidden,
            bench.dtype,
        )

    def refuses(self, case: Case) -> str | None:
        most = self._group.op.capacity
        return None if case.tokens <= most else f"above its staging of {most} tokens"

    def buffers(self, case: Case, count: int) -> list[Buffer]:
        place = self.bench.place
        owned = self._exchange.owned(case.tokens, place.rank, place.world_size)
        return [
            Buffer(
                self.bench.x[start : start + case.tokens],
                self.bench.residual[start + owned.start : start + owned.stop],
                owned.start,
            )
            for start in range(0, count * case.tokens, case.tokens)
        ]

    def run(self, buffer: Buffer) -> Output:
        out = self._group.op.launch(buffer.x, buffer.residual, self.bench.weight, EPS)
        return Output(out, buffer.residual)

    def close(self) -> None:
        self._group.close()


class Floor:
    """Peer copies from every rank to all others at once: the rate the link has for this traffic."""

    def __init__(self, place: Place, num_streams: int) -> None:
        """Share memory and check that a copy arrives; a collective call."""
        self._place = place
        peers = place.world_size - 1
        self._part = FLOOR_BYTES // (peers * num_streams) // 256 * 256  # bytes of one copy
        self._memory = PeerMemory(2 * FLOOR_BYTES, place.device, place.group)
        self._streams = [torch.cuda.Stream(place.device) for _ in range(num_streams - 1)]
        self.bytes = self._part * peers * num_streams  # sent per call, and received
        self._check()

    def run(self, _: int = 0) -> None:
        """Enqueue the copies on the current stream and, forked from it, our own."""
        current = torch.cuda.current_stream()
        for index, stream in enumerate([current, *self._streams]):
            if stream is not current:
                stream.wait_stream(current)
            self._send(index, stream)
        for stream in self._streams:
            current.wait_stream(stream)

    def close(self) -> None:
        """Unmap; a collective call."""
        self._place.meet()
        self._memory.close()

    def _send(self, index: int, stream: torch.cuda.Stream) -> None:
        own = self._memory.addresses[self._place.rank]
        size = self._place.world_size
        for step in range(1, size):  # another peer on every rank at any time
            piece = (index * (size - 1) + step - 1) * self._part
            peer = self._memory.addresses[(self._place.rank + step) % size]
            driver.call(
                "cuMemcpyDtoDAsync",
                peer + FLOOR_BYTES + piece,
                own + piece,
                self._part,
                stream.cuda_stream,
            )

    def _check(self) -> None:
        memory = self._memory.bytes
        memory[:FLOOR_BYTES].fill_(self._place.rank + 1)
        memory[FLOOR_BYTES:].zero_()
        self._place.meet()
        self.run()
        self._place.meet()
        got = memory[FLOOR_BYTES : FLOOR_BYTES + self.bytes].view(-1, self._part)[:, -1].tolist()
        size = self._place.world_size
        streams = len(self._streams) + 1
        wanted = [(self._place.rank - step) % size + 1 for step in range(1, size)] * streams
        if got != wanted:
            raise Absent(f"peer copies brought {got} where {wanted} was sent")


OURS: dict[str, Callable[[Workbench, str], Variant]] = {
    **{f"fused/{ctas}": Fused for ctas in FUSED_CTAS},
    **{f"multicast/{ctas}": Multicast for ctas in FUSED_CTAS},
    "copy_engine": CopyEngines,
    **dict.fromkeys(_EXCHANGES, Push),
}


def floors(place: Place) -> Sequence[tuple[str, Floor]]:
    """Return the ways to copy; the faster one is the floor. A collective call."""
    return [(f"floor/{streams}", Floor(place, streams)) for streams in (1, 2)]
