"""Which bytes the copy engines move for one op, and where scratch memory holds what: pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import torch

_FLAG_BYTES = 8  # as the kernel writes them; a stream writes the lower half
_ALIGNMENT = 512
# A share of so many bytes is moved in two pieces: the first one is normalised while the second one
# travels. With less, that gains less than what more copies and flags take: 12 us on two GPUs.
CUT_BYTES = 16 * 2**20


class Channel(IntEnum):
    """Ops on two streams may meet their peers in any order, so each stream has flags of its own."""

    IN_LINE = 0
    BESIDE = 1


class Phase(IntEnum):
    """What a flag says, and what a rank waits for; 0 where it waits for nothing."""

    PART = 1  # of a peer: the first of two pieces of its partial rows is in your staging
    FULL = 2  # of a peer: all of them are
    DONE = 3  # of an owner: its normalised rows are in your output, and your staging is free


@dataclass(frozen=True)
class Region:
    """Memory of one size on every rank, and where this rank reaches each."""

    rank: int
    addresses: tuple[int, ...]  # by rank, its own too
    num_bytes: int

    def everywhere(self, address: int, num_bytes: int) -> tuple[int, ...] | None:
        """Return by rank the place that `address` is on this one; None: it is not in here."""
        offset = address - self.addresses[self.rank]
        if offset < 0 or offset + num_bytes > self.num_bytes:
            return None
        return tuple(base + offset for base in self.addresses)


@dataclass(frozen=True)
class Layout:
    """An engine's largest shape, and its scratch memory: flags, counts, staging.

    Offsets are alike on all ranks. Staging of a rank: per channel a slot for each other rank.
    """

    world_size: int
    capacity: int  # rows of the largest slot
    hidden_size: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Return the scratch memory of a rank."""
        return _ALIGNMENT + len(Channel) * self._channel_bytes

    def flag(self, channel: Channel, phase: Phase, peer: int) -> int:
        """Return the offset of the flag that `peer` sets."""
        return ((channel * len(Phase) + phase - 1) * self.world_size + peer) * _FLAG_BYTES

    def count(self, channel: Channel) -> int:
        """Return the offset of the count of ops."""
        return (len(Channel) * len(Phase) * self.world_size + channel) * _FLAG_BYTES

    def staging(self, channel: Channel, owner: int, peer: int) -> int:
        """Return the offset, in the owner's memory, of what `peer` sends."""
        index = peer if peer < owner else peer - 1
        return _ALIGNMENT + channel * self._channel_bytes + index * self._share_bytes

    @property
    def _share_bytes(self) -> int:
        return -(-self.capacity // self.world_size) * self.row_bytes

    @property
    def _channel_bytes(self) -> int:
        return (self.world_size - 1) * self._share_bytes


@dataclass(frozen=True)
class Copy:
    """One copy: where to, where from, how much."""

    target: int
    source: int
    num_bytes: int


Lanes = tuple[tuple[Copy, ...], ...]  # side by side; within a lane, one after the other


@dataclass(frozen=True)
class Rows:
    """One tensor's rows on all ranks."""

    addresses: tuple[int, ...]  # of the first row, by rank
    row_bytes: int

    def address(self, rank: int, row: int) -> int:
        return self.addresses[rank] + row * self.row_bytes


@dataclass(frozen=True)
class Piece:
    """What a rank does for one piece of every rank's share."""

    phase: Phase  # what it tells its peers when it has sent its partial rows
    scatter: Lanes
    gather: Lanes
    parts: tuple[int, ...]  # this rank's rows of each rank's partial sums
    outputs: tuple[int, ...]  # this rank's rows of each output
    start: int  # the first of these rows, counted from the first one of the share
    num_rows: int


def peers_of(rank: int, world_size: int) -> tuple[int, ...]:
    """Return the other ranks, nearest first: at any moment all ranks copy to different ones."""
    return tuple((rank + step) % world_size for step in range(1, world_size))


def make_plan(
    layout: Layout,
    scratch: Region,
    channel: Channel,
    num_tokens: int,
    x: Rows,
    outputs: tuple[Rows, ...],
    num_lanes: int,
    cut_bytes: int,
) -> tuple[Piece, ...]:
    """Plan an op on `x`, in one piece or two, as the scratch memory's own rank.

    Its result goes to `outputs`: rows, and their scales where it has any. All ranks cut alike.
    """
    rank, share = scratch.rank, -(-num_tokens // layout.world_size)
    peers = peers_of(rank, layout.world_size)
    is_whole = share * x.row_bytes < cut_bytes
    phases = [Phase.FULL] if is_whole else [Phase.PART, Phase.FULL]

    def rows_of(owner: int, index: int) -> range:
        """Return an owner's rows of a piece, counted from the first one of its share."""
        num_rows = max(min(share, num_tokens - owner * share), 0)
        ends = [num_rows * i // len(phases) for i in range(len(phases) + 1)]
        return range(ends[index], ends[index + 1])

    def staged(owner: int, peer: int, row: int) -> int:
        place = layout.staging(channel, owner, peer) + row * x.row_bytes
        return scratch.addresses[owner] + place

    def scatter(peer: int, index: int) -> list[Copy]:
        rows = rows_of(peer, index)
        source = x.address(rank, peer * share + rows.start)
        return [Copy(staged(peer, rank, rows.start), source, len(rows) * x.row_bytes)]

    def piece(index: int, phase: Phase) -> Piece:
        rows = rows_of(rank, index)
        first = rank * share + rows.start

        def gather(peer: int) -> list[Copy]:
            return [
                Copy(
                    each.address(peer, first), each.address(rank, first), len(rows) * each.row_bytes
                )
                for each in outputs
            ]

        return Piece(
            phase=phase,
            scatter=_in_lanes(num_lanes, (scatter(peer, index) for peer in peers)),
            gather=_in_lanes(num_lanes, (gather(peer) for peer in peers)),
            parts=tuple(
                x.address(rank, first) if peer == rank else staged(rank, peer, rows.start)
                for peer in range(layout.world_size)
            ),
            outputs=tuple(each.address(rank, first) for each in outputs),
            start=rows.start,
            num_rows=len(rows),
        )

    return tuple(piece(index, phase) for index, phase in enumerate(phases))


def _in_lanes(num_lanes: int, by_peer: Iterable[list[Copy]]) -> Lanes:
    wanted = [[copy for copy in copies if copy.num_bytes] for copies in by_peer]
    wanted = [copies for copies in wanted if copies]
    lanes = (wanted[lane::num_lanes] for lane in range(num_lanes))
    return tuple(tuple(copy for copies in lane for copy in copies) for lane in lanes if lane)
