"""Memory that every rank of a tensor-parallel group can reach: VMM allocations, mapped by all.

Driver API, virtual memory management: create, export as a file descriptor, exchange, import, map.
"""

import os
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from sglang_tokenweave import descriptors, driver
from sglang_tokenweave.agreement import gather, step

DEADLINE_S = 60.0  # for the exchange of descriptors


class PeerMemory:
    """One allocation per rank, of equal size, mapped by all ranks.

    `addresses[r]` is where this process reaches rank r's memory; `bytes` is its own as a tensor.
    """

    def __init__(self, num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> None:
        """Allocate at least `num_bytes`; a collective call over `group`, a CPU group of one host.

        Raises:
            DisagreementError: on all ranks, when any rank failed; nothing stays allocated.
        """
        self.rank = dist.get_rank(group)
        self.addresses: list[int] = []
        with ExitStack() as stack:
            device_index = _ordinal(device)
            size = step("sizing", group, lambda: _round_up(num_bytes, _granularity(device_index)))
            sizes = gather(size, group)
            size = max(sizes)
            own = step("cuMemCreate", group, lambda: _create(size, device_index, stack))
            exported = step("export", group, lambda: _export(own, stack))
            token = gather(descriptors.new_token(), group)[0]
            received = step(
                "exchange of descriptors", group, lambda: _exchange(exported, token, group, stack)
            )
            self._mapped = stack.enter_context(ExitStack())

            def map_all() -> None:
                for rank, descriptor in enumerate(received):
                    handle = own if rank == self.rank else _import(descriptor, self._mapped)
                    self.addresses.append(_map(handle, size, device_index, self._mapped))

            step("mapping", group, map_all)
            self.bytes = _as_tensor(self.addresses[self.rank], size, device)
            self.bytes.zero_()
            torch.cuda.synchronize(device)
            dist.barrier(group)  # nobody signals into memory that is not zeroed yet
            # Keep what is mapped; the handles, closed with `stack`, live on in the mappings.
            self._mapped = self._mapped.pop_all()

    def close(self) -> None:
        """Unmap; all ranks must have finished using the memory."""
        self.addresses = []
        self._mapped.close()


def _ordinal(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _properties(device_index: int) -> Any:
    cuda = driver.bindings()
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device_index
    properties.requestedHandleTypes = _handle_type()
    return properties


def _handle_type() -> Any:
    return driver.bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _granularity(device_index: int) -> int:
    recommended = (
        driver.bindings().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    )
    return int(driver.call("cuMemGetAllocationGranularity", _properties(device_index), recommended))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _create(size: int, device_index: int, stack: ExitStack) -> Any:
    handle = driver.call("cuMemCreate", size, _properties(device_index), 0)
    driver.on_exit(stack, "cuMemRelease", handle)
    return handle


def _export(handle: Any, stack: ExitStack) -> int:
    descriptor = int(driver.call("cuMemExportToShareableHandle", handle, _handle_type(), 0))
    stack.callback(os.close, descriptor)
    return descriptor


def _exchange(own: int, token: str, group: dist.ProcessGroup, stack: ExitStack) -> list[int]:
    rank = dist.get_rank(group)
    received = descriptors.exchange(own, rank, dist.get_world_size(group), token, DEADLINE_S)
    # At once: this rank may have got all of them where another one failed.
    for sender, descriptor in enumerate(received):
        if sender != rank:
            stack.callback(os.close, descriptor)
    return received


def _import(descriptor: int, stack: ExitStack) -> Any:
    handle = driver.call("cuMemImportFromShareableHandle", descriptor, _handle_type())
    driver.on_exit(stack, "cuMemRelease", handle)
    return handle


def _map(handle: Any, size: int, device_index: int, stack: ExitStack) -> int:
    address = driver.call("cuMemAddressReserve", size, 0, 0, 0)
    driver.on_exit(stack, "cuMemAddressFree", address, size)
    driver.call("cuMemMap", address, size, 0, handle, 0)
    driver.on_exit(stack, "cuMemUnmap", address, size)
    cuda = driver.bindings()
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device_index
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    driver.call("cuMemSetAccess", address, size, [access], 1)
    return int(address)


def _as_tensor(address: int, size: int, device: torch.device) -> torch.Tensor:
    """Return the memory as a uint8 tensor, without a copy."""

    class Memory:
        __cuda_array_interface__ = {  # noqa: RUF012 - the protocol asks for a plain attribute
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    return torch.as_tensor(Memory(), device=device)
