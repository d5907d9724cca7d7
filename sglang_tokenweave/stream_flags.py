"""How ranks tell one another that their copies have arrived: two or three exchanges of flags an op.

Values are constants (set to 1, awaited as 1, reset to 0 by who waited), so that a captured graph
can be replayed. No flag says that staging is free: a peer's next op follows its wait for DONE.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from sglang_tokenweave import add_rmsnorm, driver
from sglang_tokenweave.copy_plan import Channel, Layout, Phase, Region, peers_of
from sglang_tokenweave.kernels import MAX_RANKS
from sglang_tokenweave.loading import load_kernel
from sglang_tokenweave.watchdog import Board

_WARP = 32
_KEYS = tuple((channel, phase) for channel in Channel for phase in Phase)

Work = TypeVar("Work")  # what a stream is given


class Flags(ABC, Generic[Work]):
    """Exchanges flags on a stream."""

    def __init__(self, make: Callable[[Channel, Phase, bool, bool], Work]) -> None:
        """Prepare all that is ever enqueued: `make` is told whether it tells, and if it waits."""
        self._tell = {key: make(*key, True, False) for key in _KEYS}
        self._wait = {key: make(*key, False, True) for key in _KEYS}
        self._both = {key: make(*key, True, True) for key in _KEYS}

    def tell(self, stream: int, channel: Channel, phase: Phase) -> None:
        """Set this rank's flag at every peer."""
        self._enqueue(stream, self._tell[channel, phase])

    def wait(self, stream: int, channel: Channel, phase: Phase) -> None:
        """Wait for the peers' flags here, and clear them."""
        self._enqueue(stream, self._wait[channel, phase])

    def exchange(self, stream: int, channel: Channel, phase: Phase) -> None:
        """Do both, which takes no longer than one."""
        self._enqueue(stream, self._both[channel, phase])

    @abstractmethod
    def _enqueue(self, stream: int, work: Work) -> None: ...


class MemoryOpFlags(Flags[list[Any]]):
    """Flags by stream memory operations: no SM is busy while a rank waits, nor is there a deadline.

    So each wait is on a `Board`, which a watchdog looks at.
    """

    def __init__(self, layout: Layout, scratch: Region, board: Board) -> None:
        super().__init__(partial(_batch, layout, scratch, board))

    def _enqueue(self, stream: int, work: list[Any]) -> None:
        driver.call("cuStreamBatchMemOp", stream, len(work), work, 0)


class KernelFlags(Flags["Params"]):
    """Flags by a kernel of one warp, which has a deadline of its own."""

    def __init__(
        self, layout: Layout, scratch: Region, deadline_s: float, device: torch.device
    ) -> None:
        expression = f"exchange_flags<{_WARP}>"
        self._kernel = load_kernel("exchange_flags.cu", expression, device, num_threads=_WARP)
        super().__init__(partial(_params, layout, scratch, deadline_s))

    def _enqueue(self, stream: int, work: "Params") -> None:
        add_rmsnorm.launch(self._kernel, stream, 1, work)


class Params(ctypes.Structure):
    """`Params` of cuda/exchange_flags.cu."""

    _fields_ = (
        ("theirs", ctypes.c_uint64 * MAX_RANKS),
        ("mine", ctypes.c_uint64 * MAX_RANKS),
        ("deadline_ns", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("channel", ctypes.c_uint32),
        ("phase", ctypes.c_uint32),
    )


def _flags(
    layout: Layout, scratch: Region, channel: Channel, phase: Phase
) -> dict[int, tuple[int, int]]:
    """Return by peer where this rank's flag is there, and where the peer's is here."""
    rank = scratch.rank
    return {
        peer: (
            scratch.addresses[peer] + layout.flag(channel, phase, rank),
            scratch.addresses[rank] + layout.flag(channel, phase, peer),
        )
        for peer in peers_of(rank, layout.world_size)
    }


def _batch(
    layout: Layout,
    scratch: Region,
    board: Board,
    channel: Channel,
    phase: Phase,
    tells: bool,
    waits: bool,
) -> list[Any]:
    flags = _flags(layout, scratch, channel, phase).values()
    told = [_write(theirs, 1) for theirs, _ in flags] if tells else []
    if not waits:
        return told
    shown = board.device_address(channel)
    # The kernel before the last wait announces that one itself.
    entered = [] if phase == Phase.DONE else [_write(shown, phase)]
    left = [_write(shown, 0)] if phase == Phase.DONE else []
    return [
        *told,
        *entered,
        *(_wait(mine, 1) for _, mine in flags),
        *(_write(mine, 0) for _, mine in flags),
        *left,
    ]


def _write(address: int, value: int) -> Any:
    cuda = driver.bindings()
    op = cuda.CUstreamBatchMemOpParams()
    op.operation = cuda.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
    op.writeValue.address = address
    op.writeValue.value = value
    # The default orders everything before it in the stream, copies too, before the write.
    op.writeValue.flags = cuda.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
    return op


def _wait(address: int, value: int) -> Any:
    cuda = driver.bindings()
    op = cuda.CUstreamBatchMemOpParams()
    op.operation = cuda.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WAIT_VALUE_32
    op.waitValue.address = address
    op.waitValue.value = value
    op.waitValue.flags = cuda.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
    return op


def _params(
    layout: Layout,
    scratch: Region,
    deadline_s: float,
    channel: Channel,
    phase: Phase,
    tells: bool,
    waits: bool,
) -> Params:
    params = Params(
        deadline_ns=int(deadline_s * 1e9), rank=scratch.rank, channel=channel, phase=phase
    )
    for peer, (theirs, mine) in _flags(layout, scratch, channel, phase).items():
        params.theirs[peer] = theirs if tells else 0
        params.mine[peer] = mine if waits else 0
    return params
