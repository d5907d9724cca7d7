"""What the SMs that the fused kernel has could move without it: cuda/sm_limits.cu."""

import ctypes
from collections.abc import Sequence

import torch

from benchmarks.ours import Ours
from benchmarks.variant import Absent
from benchmarks.workbench import Workbench
from sglang_tokenweave.loading import load_kernel
from sglang_tokenweave.symmetric import PeerMemory
from sglang_tokenweave.transport import Slot, SymmetricBuffer

HIDDEN = 8192
NUM_RANKS = 2
PARTS = 3  # a row's addends at two ranks; its results
_ROW_BYTES = 2 * HIDDEN
_THREADS, _SHARED_BYTES = 512, 3 * PARTS * _ROW_BYTES
LIMIT_CTAS = (4, 8, 16, 32)


class _Params(ctypes.Structure):
    """`Params` of sm_limits.cu."""

    _fields_ = (
        ("in_", ctypes.c_uint64 * PARTS),
        ("out", ctypes.c_uint64 * PARTS),
        ("rows", ctypes.c_uint32),
    )


class Mover:
    """A kernel that reads three parts of each row, or writes three, or both."""

    def __init__(self, *, reads: bool, writes: bool) -> None:
        """Compile it for the current device and load it."""
        self._kernel = load_kernel(
            "sm_limits.cu",
            f"sm_limits<{str(reads).lower()}, {str(writes).lower()}>",
            torch.device("cuda"),
            num_threads=_THREADS,
            shared_bytes=_SHARED_BYTES,
        )

    def launch(self, source: Sequence[int], target: Sequence[int], rows: int, ctas: int) -> None:
        """Enqueue it on the current stream.

        Args:
            source, target: three addresses each, of `[rows, 8192]` in a type of 16 bits.
        """
        addresses = ctypes.c_uint64 * PARTS
        parameters = _Params(addresses(*source), addresses(*target), rows)
        self._kernel.launch(torch.cuda.current_stream().cuda_stream, ctas, parameters)


class ReadWrite(Ours):
    """The reads and writes of the fused kernel between two GPUs: no sums, and no meetings."""

    computes = False

    def __init__(self, bench: Workbench, name: str) -> None:
        place = bench.place
        if place.world_size != NUM_RANKS or bench.hidden != HIDDEN:
            raise Absent(f"sm_limits.cu is of {NUM_RANKS} ranks and rows of {HIDDEN} elements")
        self._ctas = int(name.partition("/")[2])
        self._mover = Mover(reads=True, writes=True)
        num_bytes = bench.capacity * _ROW_BYTES
        self._peers = PeerMemory(num_bytes, place.device, place.group)
        bench.on_close(self._peers.close)
        rows = self._peers.bytes[:num_bytes].view(bench.dtype).view(bench.capacity, HIDDEN)
        super().__init__(bench, name, SymmetricBuffer(rows))

    def launch(self, slot: Slot, residual: torch.Tensor | None) -> None:
        assert residual is not None, "the op benchmark has one"
        place = self.bench.place
        owned = slot.owned_rows(place.rank, NUM_RANKS)
        first = slot.tensor.data_ptr() + owned.start * _ROW_BYTES - self._peers.bytes.data_ptr()
        parts = [*(address + first for address in self._peers.addresses), residual.data_ptr()]
        self._mover.launch(parts, parts, owned.stop - owned.start, self._ctas)


LIMITS = {f"read+write/{ctas}": ReadWrite for ctas in LIMIT_CTAS}
