"""Ends this process when one of its streams waits too long: stream waits have no deadline.

A stream shows what it waits for on a board in the host's memory, in stream order: an op that is
queued behind others shows nothing yet. What it shows is (phase, count), and the count goes up with
every op, replayed ones too. So the same pair seen again is the same wait, however many ops a second
there are.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_tokenweave import driver
from sglang_tokenweave.copy_plan import Channel, Layout, Phase, Region, peers_of

_BOARD_BYTES = 4096
_FLAGS_OFFSET = 512
_POLL_S = 1.0
_READ_TIMEOUT_S = 2.0  # of the last look at the flags, which a hung device may not answer

Shown = tuple[int, int]  # phase (0: nothing is waited for), count


class Board:
    """Host memory that the device writes: per channel, the phase and the count of ops."""

    def __init__(self) -> None:
        cuda = driver.bindings()
        flags = cuda.CU_MEMHOSTALLOC_PORTABLE | cuda.CU_MEMHOSTALLOC_DEVICEMAP
        self.address = int(driver.call("cuMemHostAlloc", _BOARD_BYTES, flags))
        ctypes.memset(self.address, 0, _BOARD_BYTES)
        self._device_address = int(driver.call("cuMemHostGetDevicePointer", self.address, 0))

    def device_address(self, channel: Channel) -> int:
        """Return where the device writes a channel's phase; its count is 4 bytes further."""
        return self._device_address + 8 * channel

    def shown(self) -> dict[Channel, Shown]:
        words = (ctypes.c_uint32 * (2 * len(Channel))).from_address(self.address)
        return {channel: (words[2 * channel], words[2 * channel + 1]) for channel in Channel}

    def close(self) -> None:
        """Free the memory; no stream may show anything any more."""
        driver.call("cuMemFreeHost", self.address)


@dataclass
class Stalls:
    """Measures how long each channel has shown one and the same wait."""

    deadline_s: float
    _last: dict[Channel, Shown] = field(default_factory=dict)
    _waited_s: dict[Channel, float] = field(default_factory=dict)

    def observe(self, shown: dict[Channel, Shown], elapsed_s: float) -> Channel | None:
        """Return a channel that has waited to the deadline; `elapsed_s`: since the last call."""
        for channel, wait in shown.items():
            is_same = wait[0] != 0 and self._last.get(channel) == wait
            self._waited_s[channel] = self._waited_s[channel] + elapsed_s if is_same else 0.0
        self._last = dict(shown)
        late = [channel for channel, s in self._waited_s.items() if s >= self.deadline_s]
        return late[0] if late else None


class FlagReader:
    """Copies this rank's flags to the host, past the streams that wait."""

    def __init__(self, layout: Layout, scratch: Region, board: Board) -> None:
        self._layout = layout
        self._scratch = scratch
        self._board = board
        # Now: a context and a stream of its own, so that a hung device is asked for nothing new.
        self._context = driver.call("cuCtxGetCurrent")
        non_blocking = driver.bindings().CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = driver.call("cuStreamCreate", non_blocking)

    def missing(self, channel: Channel, phase: Phase) -> dict[int, int]:
        """Return by peer the value of each flag that is not set.

        Raises:
            RuntimeError: the device does not answer.
        """
        rank, layout = self._scratch.rank, self._layout
        driver.call("cuCtxSetCurrent", self._context)
        target = self._board.address + _FLAGS_OFFSET
        source = self._scratch.addresses[rank]
        num_bytes = layout.count(Channel.IN_LINE)  # flags come first
        driver.call("cuMemcpyAsync", target, source, num_bytes, self._stream)
        self._synchronize()
        seen = {
            peer: ctypes.c_uint32.from_address(target + layout.flag(channel, phase, peer)).value
            for peer in peers_of(rank, layout.world_size)
        }
        return {peer: value for peer, value in seen.items() if value != 1}

    def close(self) -> None:
        driver.call("cuStreamDestroy", self._stream)

    def _synchronize(self) -> None:
        end = time.monotonic() + _READ_TIMEOUT_S
        while self._is_busy():
            if time.monotonic() > end:
                raise RuntimeError(f"the device did not answer in {_READ_TIMEOUT_S:g} s")
            time.sleep(0.01)

    def _is_busy(self) -> bool:
        try:
            driver.call("cuStreamQuery", self._stream)
        except driver.CudaError as error:
            if error.error == "CUDA_ERROR_NOT_READY":
                return True
            raise
        return False


def abort(message: str) -> None:
    """End this process at once, with a message.

    A rank's streams cannot be rescued, and its main thread may sit in the driver for good, so no
    exception would reach it. SGLang's launcher looks at its workers each second and shuts the
    server down when one has ended by a signal; SIGABRT is also what torch's NCCL watchdog uses,
    and lets faulthandler, which SGLang switches on, print where each thread was.
    """
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{message}\n".encode())
    os.abort()


class Watchdog:
    """A thread that looks at a board each second, and makes no call to the driver meanwhile."""

    def __init__(
        self,
        rank: int,
        board: Board,
        missing: Callable[[Channel, Phase], dict[int, int]],
        deadline_s: float,
        end: Callable[[str], None] = abort,
    ) -> None:
        self._rank = rank
        self._board = board
        self._missing = missing
        self._deadline_s = deadline_s
        self._end = end
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tokenweave-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        stalls = Stalls(self._deadline_s)
        poll_s = min(_POLL_S, self._deadline_s / 10)
        last = time.monotonic()
        while not self._closing.wait(poll_s):
            now = time.monotonic()
            # A container that was paused has not waited all that time.
            elapsed_s, last = min(now - last, 2 * poll_s), now
            shown = self._board.shown()
            channel = stalls.observe(shown, elapsed_s)
            if channel is not None:
                self._end(self._message(channel, *shown[channel]))
                return

    def _message(self, channel: Channel, phase: int, count: int) -> str:
        where = f"rank {self._rank} (process {os.getpid()}), channel {channel.name}, op {count}"
        name = Phase(phase).name
        text = f"tokenweave: {where}: a stream has waited {self._deadline_s:g} s for flags {name}"
        try:
            missing = self._missing(channel, Phase(phase))
        except RuntimeError as error:
            return f"{text}, which cannot be read ({error}); ending this process"
        if not missing:
            return f"{text}, which are all set: its own copies hang; ending this process"
        seen = ", ".join(f"rank {peer}'s: expected 1, seen {v}" for peer, v in missing.items())
        return f"{text}: {seen}; those ranks hang, have died, or run other ops; ending this process"
