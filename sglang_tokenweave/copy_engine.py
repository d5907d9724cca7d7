"""`allreduce_rmsnorm` by the copy engines: no SM is busy while bytes travel.

Each rank copies its partial rows to their owners' staging and says so (FULL); an owner that has
them all adds and normalises its rows in a short kernel, copies the result to all ranks and says so
(DONE). Large shares are cut in two: the first piece is normalised while the second one travels, and
the second one while the first one's result does. Everything can be captured in a CUDA graph.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import Any, Literal

import torch
import torch.distributed as dist

from sglang_tokenweave import add_rmsnorm, driver
from sglang_tokenweave.agreement import Group, as_group, step
from sglang_tokenweave.copy_lanes import Aside, CopyLanes, new_event, new_stream, order
from sglang_tokenweave.copy_plan import (
    CUT_BYTES,
    Channel,
    Layout,
    Phase,
    Piece,
    Region,
    Rows,
    make_plan,
)
from sglang_tokenweave.deadlines import DEVICE_S
from sglang_tokenweave.kernels import FP8
from sglang_tokenweave.loading import load_kernel
from sglang_tokenweave.operands import check_tensor
from sglang_tokenweave.stream_flags import Flags, KernelFlags, MemoryOpFlags
from sglang_tokenweave.symmetric import PeerMemory
from sglang_tokenweave.transport import Done, Pending, Slot
from sglang_tokenweave.watchdog import Board, FlagReader, Watchdog

MAX_LANES = 4  # a GPU has few engines for its peers, and each stream more costs two events
_PLANS = 4096  # kept; each is a few hundred bytes
_EVENTS = 16  # ops beside that may be pending and still be told apart
# Fewer channels of the hardware than this, and a stream that waits holds up others.
_LEAST_CONNECTIONS = 4

Normalise = Callable[[Piece], None]  # enqueue the kernel for a piece's own rows


class CopyEngine:
    """The op of one rank; all ranks make the same calls in the same order."""

    def __init__(
        self,
        layout: Layout,
        scratch: Region,
        regions: Sequence[Region],
        device: torch.device,
        *,
        flags: Literal["memory_ops", "kernels"] = "memory_ops",
        can_write_fp8: bool = False,
        max_lanes: int = MAX_LANES,
        deadline_s: float = DEVICE_S,
        cut_bytes: int = CUT_BYTES,
    ) -> None:
        """Load the kernels for `layout`; `device` is the current one.

        Args:
            layout: the largest slot.
            scratch: at least `layout.num_bytes` on each rank, zeroed on all of them.
            regions: the memory that slots and outputs are in.
            device: where this rank runs.
            flags: who exchanges flags: the stream itself, or a kernel of one warp.
            can_write_fp8: whether results may be FP8.
            max_lanes: streams that copy at once, for each of the two channels.
            deadline_s: of each wait; then this process ends.
            cut_bytes: of a rank's share of the rows, from which on it is moved in two pieces.

        Raises:
            ValueError: the kernel does not serve this layout, memory is not as described, or an
                option is none of those.
            RuntimeError: a stream's wait would hold up other streams of this process.
        """
        self.rank = scratch.rank
        self._layout = layout
        self._scratch = scratch
        self._regions = tuple(regions)
        self._num_lanes = min(layout.world_size - 1, max_lanes)
        self._cut_bytes = cut_bytes
        _check_connections()
        _check_memory(layout, scratch, self._regions)
        if flags not in ("memory_ops", "kernels"):
            raise ValueError(f"flags {flags!r}: expected 'memory_ops' or 'kernels'")
        if max_lanes < 1:
            raise ValueError(f"max_lanes {max_lanes}: there must be one at least")
        outputs = [layout.dtype, *([FP8] if can_write_fp8 else [])]
        self._kernels = {dtype: _load(layout, dtype, device) for dtype in outputs}
        self._plan = lru_cache(maxsize=_PLANS)(self._make_plan)
        with ExitStack() as stack:
            self._board = _board(stack) if flags == "memory_ops" else None
            self._flags: Flags[Any]
            if self._board:
                self._flags = MemoryOpFlags(layout, scratch, self._board)
                _watch(stack, layout, scratch, self._board, deadline_s)
            else:
                self._flags = KernelFlags(layout, scratch, deadline_s, device)
            self._lanes = {ch: CopyLanes.create(stack, self._num_lanes) for ch in Channel}
            self._aside = {ch: Aside.create(stack) for ch in Channel}
            self._side, self._started = new_stream(stack, priority=-1), new_event(stack)
            self._finished = cycle([new_event(stack) for _ in range(_EVENTS)])
            self._resources = stack.pop_all()

    @classmethod
    def create(
        cls,
        group: dist.ProcessGroup | Group,
        device: torch.device,
        layout: Layout,
        regions: Sequence[Region],
        **options: Any,
    ) -> "CopyEngine":
        """Make an engine and its scratch memory; a collective call over `group`, a CPU group.

        Args:
            group: of the ranks of one host.
            device, layout, regions, options: as of `CopyEngine`.

        Raises:
            ValueError: as of `CopyEngine`.
            DisagreementError: on all ranks, when any rank failed; nothing stays allocated.
            LostRankError: some rank did not take part.
        """
        group = as_group(group)
        with ExitStack() as stack:
            memory = PeerMemory(layout.num_bytes, device, group)
            stack.callback(memory.close)
            scratch = Region(group.rank, tuple(memory.addresses), layout.num_bytes)

            def make() -> CopyEngine:
                engine = cls(layout, scratch, regions, device, **options)
                stack.enter_context(engine._resources)  # also if it is another rank that fails
                return engine

            engine = step("copy engine", group, make)
            engine._resources = stack.pop_all()
        return engine

    def add_region(self, region: Region) -> None:
        """Let slots and results be in this memory, too.

        Raises:
            ValueError: it is of another number of ranks.
        """
        _check_memory(self._layout, self._scratch, [region])
        self._regions = (*self._regions, region)

    def allreduce_rmsnorm(
        self,
        slot: Slot,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        beside: bool,
        weight_offset: float = 0.0,
        out: Slot | None = None,
    ) -> Pending:
        """See `Transport.allreduce_rmsnorm`.

        Raises:
            ValueError: a tensor is not what the engine takes.
        """
        out = slot if out is None else out
        self._check(slot, out, residual, weight)
        channel = Channel.BESIDE if beside else Channel.IN_LINE
        tensors = [slot.tensor, out.tensor, *([] if out.scales is None else [out.scales])]
        pointers = tuple((tensor.data_ptr(), tensor.dtype.itemsize) for tensor in tensors)
        pieces = self._plan(channel, slot.num_tokens, pointers)
        caller = torch.cuda.current_stream().cuda_stream
        stream = self._side if beside else caller
        if beside:
            order(self._started, caller, stream)

        def normalise(piece: Piece) -> None:
            parameters = self._parameters(channel, piece, residual, weight, eps, weight_offset)
            # One block without rows, too: it counts.
            num_blocks = max(piece.num_rows, 1)
            add_rmsnorm.launch(self._kernels[out.tensor.dtype], stream, num_blocks, parameters)

        if len(pieces) == 1:
            self._move_at_once(stream, channel, pieces[0], normalise)
        else:
            self._move_in_pieces(stream, channel, pieces, normalise)
        self._flags.exchange(stream, channel, Phase.DONE)

        if not beside:
            return Done()
        finished = next(self._finished)
        driver.call("cuEventRecord", finished, stream)
        return _EventPending(finished)

    def _move_at_once(
        self, stream: int, channel: Channel, piece: Piece, normalise: Normalise
    ) -> None:
        lanes = self._lanes[channel]
        lanes.copy(stream, piece.scatter)
        self._flags.exchange(stream, channel, piece.phase)
        normalise(piece)
        lanes.copy(stream, piece.gather)

    def _move_in_pieces(
        self, stream: int, channel: Channel, pieces: Sequence[Piece], normalise: Normalise
    ) -> None:
        """Copy on a stream of its own, so that `stream` waits for flags and normalises meanwhile.

        A wait on a stream that has copied was seen to end only when another stream's copy did.
        No rank waits for flags of a piece before it has told its own: whatever order the hardware
        takes these streams in, the peers' waits end.
        """
        lanes, flags, aside = self._lanes[channel], self._flags, self._aside[channel]
        order(aside.begun, stream, aside.stream)
        for piece, sent in zip(pieces, aside.sent, strict=True):
            lanes.copy(aside.stream, piece.scatter)
            flags.tell(aside.stream, channel, piece.phase)
            driver.call("cuEventRecord", sent, aside.stream)

        for piece, sent in zip(pieces, aside.sent, strict=True):
            driver.call("cuStreamWaitEvent", stream, sent, 0)
            flags.wait(stream, channel, piece.phase)
            normalise(piece)
            order(aside.normalised, stream, aside.stream)
            lanes.copy(aside.stream, piece.gather)
        order(aside.ended, aside.stream, stream)

    def close(self) -> None:
        """Release streams, memory and the watchdog; all ranks must have finished their ops."""
        self._resources.close()

    def _make_plan(
        self, channel: Channel, num_tokens: int, pointers: tuple[tuple[int, int], ...]
    ) -> tuple[Piece, ...]:
        hidden = self._layout.hidden_size
        names = ("slot", "result", "scales")
        columns = (hidden, hidden, 1)
        rows = []
        for name, num_columns, (pointer, itemsize) in zip(names, columns, pointers, strict=False):
            row_bytes = num_columns * itemsize
            found = (r.everywhere(pointer, num_tokens * row_bytes) for r in self._regions)
            places = next((place for place in found if place is not None), None)
            if places is None:
                raise ValueError(f"{name} is in no memory that this engine's ranks share")
            rows.append(Rows(places, row_bytes))
        x, outputs = rows[0], tuple(rows[1:])
        return make_plan(
            self._layout,
            self._scratch,
            channel,
            num_tokens,
            x,
            outputs,
            self._num_lanes,
            self._cut_bytes,
        )

    def _parameters(
        self,
        channel: Channel,
        piece: Piece,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
    ) -> add_rmsnorm.Params:
        own = self._scratch.addresses[self.rank]
        before_bytes = piece.start * self._layout.row_bytes
        return add_rmsnorm.Params(
            parts=piece.parts,
            residual=0 if residual is None else residual.data_ptr() + before_bytes,
            weight=weight.data_ptr(),
            out=piece.outputs[0],
            scales=piece.outputs[1] if len(piece.outputs) > 1 else 0,
            count=own + self._layout.count(channel),
            watched=self._board.device_address(channel) if self._board else 0,
            next_phase=piece.phase + 1,
            num_ops=int(piece.phase == Phase.FULL),
            eps=eps,
            weight_offset=weight_offset,
            num_rows=piece.num_rows,
            hidden=self._layout.hidden_size,
        )

    def _check(
        self, slot: Slot, out: Slot, residual: torch.Tensor | None, weight: torch.Tensor
    ) -> None:
        layout, rows = self._layout, slot.num_tokens
        shape, dtype = (rows, layout.hidden_size), layout.dtype
        if not 0 < rows <= layout.capacity:
            raise ValueError(f"slot has {rows} rows; this engine serves 1 to {layout.capacity}")
        out_dtype = out.tensor.dtype
        if out_dtype not in self._kernels:
            allowed = " or ".join(map(str, self._kernels))
            raise ValueError(f"the result is to be {out_dtype}; this engine writes {allowed}")
        if (out_dtype == FP8) != (out.scales is not None):
            raise ValueError(f"rows of {out_dtype}: only FP8 rows have scales, and they must")
        check_tensor("slot", slot.tensor, shape, dtype)
        check_tensor("result", out.tensor, shape, out_dtype, 8 if out_dtype == FP8 else 16)
        check_tensor("weight", weight, shape[1:], dtype)
        if residual is not None:
            owned = slot.owned_rows(self.rank, layout.world_size)
            check_tensor("residual", residual, (owned.stop - owned.start, shape[1]), dtype)
        if out.scales is not None:
            check_tensor("scales", out.scales, (rows,), torch.float32, 4)


@dataclass(frozen=True)
class _EventPending:
    event: Any

    def wait(self) -> None:
        """Order the caller's stream behind it."""
        # The event may have been recorded again since: by a later op, so this one is over, too.
        caller = torch.cuda.current_stream().cuda_stream
        driver.call("cuStreamWaitEvent", caller, self.event, 0)


def _load(layout: Layout, out_dtype: torch.dtype, device: torch.device) -> driver.Kernel:
    variant = add_rmsnorm.choose_variant(
        layout.dtype, out_dtype, layout.world_size, layout.hidden_size
    )
    return load_kernel(
        "add_rmsnorm.cu", variant.expression, device, num_threads=variant.num_threads
    )


def _board(stack: ExitStack) -> Board:
    board = Board()
    stack.callback(board.close)
    return board


def _watch(
    stack: ExitStack, layout: Layout, scratch: Region, board: Board, deadline_s: float
) -> None:
    reader = FlagReader(layout, scratch, board)
    stack.callback(reader.close)
    stack.callback(Watchdog(scratch.rank, board, reader.missing, deadline_s).close)


def _check_connections() -> None:
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    if connections.isdecimal() and int(connections) < _LEAST_CONNECTIONS:
        raise RuntimeError(
            f"CUDA_DEVICE_MAX_CONNECTIONS={connections}: with so few, streams that wait for a peer "
            f"hold up others for good; unset it, or set {_LEAST_CONNECTIONS} or more"
        )


def _check_memory(layout: Layout, scratch: Region, regions: Sequence[Region]) -> None:
    if scratch.num_bytes < layout.num_bytes:
        raise ValueError(
            f"scratch memory of {scratch.num_bytes} bytes; this layout needs {layout.num_bytes}"
        )
    for region in (scratch, *regions):
        if len(region.addresses) != layout.world_size:
            raise ValueError(
                f"memory of {len(region.addresses)} ranks; the layout has {layout.world_size}"
            )
