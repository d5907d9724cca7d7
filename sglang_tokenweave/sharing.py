"""Handles to memory, from each rank to all others: as file descriptors, or as FABRIC handles."""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from sglang_tokenweave import deadlines, descriptors, devices, driver, virtual_memory
from sglang_tokenweave.agreement import DisagreementError, Group, step


@dataclass(frozen=True)
class Member:
    """A rank of a group that shares memory."""

    group: Group
    device_index: int
    places: tuple[devices.Place, ...]  # of all ranks
    handle_type: Any  # how handles travel: `virtual_memory.posix()` or `fabric()`


def join(group: Group, device_index: int, *, across_hosts: bool) -> Member:
    """Check that all ranks can share memory, and agree on how; a collective call.

    Args:
        across_hosts: try FABRIC handles, which reach other hosts of one NVLink domain. Without, or
            where any rank cannot, handles are descriptors, which stay on one host.

    Raises:
        DisagreementError: on all ranks, naming those that cannot share memory and why.
    """
    own = step("identifying the GPU", group, lambda: devices.place(device_index))
    places = tuple(group.gather(own))
    step("peer access", group, lambda: devices.check_peer_access(device_index, places))
    problem = "FABRIC handles were not asked for"
    if across_hosts:
        try:
            step("the probe of FABRIC handles", group, lambda: _probe_fabric(device_index))
            return Member(group, device_index, places, virtual_memory.fabric())
        except DisagreementError as error:
            problem = str(error)
    if len({place.host for place in places}) > 1:
        raise DisagreementError(
            "the ranks run on several hosts, or in containers with networks of their own, and file "
            f"descriptors do not travel between those; {problem}"
        )
    return Member(group, device_index, places, virtual_memory.posix())


def share(member: Member, exported: int | bytes, stack: ExitStack) -> list[int | bytes]:
    """Return what each rank exported, in rank order; `stack` closes what came as descriptors."""
    group = member.group
    if isinstance(exported, bytes):
        return list(group.gather(exported))
    token = group.gather(descriptors.new_token())[0]

    def exchange() -> list[int | bytes]:
        received = descriptors.exchange(
            exported, group.rank, group.world_size, token, deadlines.SHARING_S
        )
        # At once: this rank may have got all of them where another one failed.
        for sender, descriptor in enumerate(received):
            if sender != group.rank:
                stack.callback(os.close, descriptor)
        return list(received)

    return step("the exchange of descriptors", group, exchange)


def hand_out(member: Member, exported: int | bytes | None, stack: ExitStack) -> int | bytes:
    """Return what rank 0 exported; the other ranks give None."""
    group = member.group
    if member.handle_type == virtual_memory.fabric():
        [handle, *_] = group.gather(exported)
        assert isinstance(handle, bytes)
        return handle
    token = group.gather(descriptors.new_token())[0]

    def broadcast() -> int:
        assert not isinstance(exported, bytes)
        descriptor = descriptors.broadcast(
            exported, 0, group.rank, group.world_size, token, deadlines.SHARING_S
        )
        if group.rank != 0:
            stack.callback(os.close, descriptor)
        return descriptor

    return step("handing out the descriptor", group, broadcast)


def _probe_fabric(device_index: int) -> None:
    if not devices.has_attribute(device_index, "HANDLE_TYPE_FABRIC_SUPPORTED"):
        raise driver.CudaError(f"GPU {device_index} has no FABRIC handles")
    fabric = virtual_memory.fabric()
    with ExitStack() as stack:
        # The attribute does not see what a container withholds: only a real export does.
        size = virtual_memory.granularity(device_index, fabric)
        handle = virtual_memory.create(size, device_index, fabric, stack)
        virtual_memory.export(handle, fabric, stack)
