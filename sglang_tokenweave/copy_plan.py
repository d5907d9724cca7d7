"""Which bytes the copy engines move for one op, and where scratch memory holds what: pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import torch

_FLAG_BYTES = 8  # as the kernel writes them; a stream writes the lower half
_ALIGNMENT = 512


class Channel(IntEnum):
    """Ops on two streams may meet their peers in any order, so each stream has flags of its own."""

    IN_LINE = 0
    BESIDE = 1


class Phase(IntEnum):
    """What a flag says, and what a rank waits for; 0 where it waits for nothing."""

    FULL = 1  # of a peer: its partial rows are in your staging
    DONE = 2  # of an owner: its normalised rows are in your output, and your staging is free


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
class Plan:
    """What one op does, as rank `rank`."""

    scatter: Lanes
    gather: Lanes
    parts: tuple[int, ...]  # this rank's rows of each rank's partial sums
    outputs: tuple[int, ...]  # this rank's rows of each output
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
) -> Plan:
    """Plan an op on `x`; its result goes to `outputs`: rows, and their scales where it has any."""
    rank, share = scratch.rank, -(-num_tokens // layout.world_size)

    def owned(owner: int) -> tuple[int, int]:
        start = min(owner * share, num_tokens)
        return start, min(start + share, num_tokens) - start

    def staged(owner: int, peer: int) -> int:
        return scratch.addresses[owner] + layout.staging(channel, owner, peer)

    def scatter(peer: int) -> list[Copy]:
        start, rows = owned(peer)
        return [Copy(staged(peer, rank), x.address(rank, start), rows * x.row_bytes)]

    first, num_rows = owned(rank)

    def gather(peer: int) -> list[Copy]:
        return [
            Copy(rows.address(peer, first), rows.address(rank, first), num_rows * rows.row_bytes)
            for rows in outputs
        ]

    peers = peers_of(rank, layout.world_size)
    return Plan(
        scatter=_in_lanes(num_lanes, (scatter(peer) for peer in peers)),
        gather=_in_lanes(num_lanes, (gather(peer) for peer in peers)),
        parts=tuple(
            x.address(rank, first) if peer == rank else staged(rank, peer)
            for peer in range(layout.world_size)
        ),
        outputs=tuple(rows.address(rank, first) for rows in outputs),
        num_rows=num_rows,
    )


def _in_lanes(num_lanes: int, by_peer: Iterable[list[Copy]]) -> Lanes:
    wanted = [[copy for copy in copies if copy.num_bytes] for copies in by_peer]
    wanted = [copies for copies in wanted if copies]
    lanes = (wanted[lane::num_lanes] for lane in range(num_lanes))
    return tuple(tuple(copy for copies in lane for copy in copies) for lane in lanes if lane)
