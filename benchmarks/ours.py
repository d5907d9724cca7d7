"""The project's own variants, and the floor that they are held against."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cases import FLOOR_BYTES, Case
from benchmarks.variant import EPS, Absent, Buffer, Output, Variant
from benchmarks.workbench import Place, Workbench
from sglang_tokenweave import driver
from sglang_tokenweave.symmetric import PeerMemory

FUSED_CTAS = (2, 4, 8, 16, 32)


class Fused(Variant):
    """Our op in place, by the fused kernel on so many thread blocks or by the copy engines."""

    def __init__(self, bench: Workbench, name: str) -> None:
        self.name = name
        self.bench = bench
        engine, _, ctas = name.partition("/")
        self._ctas = int(ctas or 2)
        self._engine = engine
        self._transport, self._memory = bench.transport
        if engine == "copy_engine" and not _takes_engine(self._transport):
            raise Absent("this transport has no copy engines")

    def buffers(self, case: Case, count: int) -> list[Buffer]:
        owned = self._memory.slot(0, case.tokens).owned_rows(
            self.bench.place.rank, self.bench.place.world_size
        )
        rows = owned.stop - owned.start
        return [
            Buffer(
                self._memory.tensor[i * case.tokens : (i + 1) * case.tokens],
                self.bench.residual[i * case.tokens : i * case.tokens + rows],
                owned.start,
            )
            for i in range(count)
        ]

    def run(self, buffer: Buffer) -> Output:
        tokens = buffer.x.shape[0]
        start = (buffer.x.data_ptr() - self._memory.tensor.data_ptr()) // (
            self.bench.hidden * buffer.x.element_size()
        )
        slot = self._memory.slot(start, start + tokens)
        _call(self._transport, slot, buffer.residual, self.bench.weight, self._ctas, self._engine)
        return Output(slot.tensor, buffer.residual)


def _takes_engine(transport: Any) -> bool:
    return "engine" in inspect.signature(transport.allreduce_rmsnorm).parameters


def _call(
    transport: Any,
    slot: Any,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    ctas: int,
    engine: str,
) -> None:
    """Call the transport: all that this benchmark knows of how it is called."""
    options = {"engine": engine} if engine == "copy_engine" else {}
    transport.allreduce_rmsnorm(
        slot, residual, weight, EPS, ctas=ctas, beside=False, **options
    ).wait()


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
    "copy_engine": Fused,
}


def floors(place: Place) -> Sequence[tuple[str, Floor]]:
    """Return the ways to copy; the faster one is the floor. A collective call."""
    return [(f"floor/{streams}", Floor(place, streams)) for streams in (1, 2)]
