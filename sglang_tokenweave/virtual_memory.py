"""Device memory by the driver's virtual memory calls; what each makes is undone by a stack."""

import os
from contextlib import ExitStack
from typing import Any

from sglang_tokenweave import driver


def posix() -> Any:
    """Return the handle type that travels as a file descriptor, among processes of one host."""
    return driver.bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def fabric() -> Any:
    """Return the handle type that travels as bytes, among the hosts of one NVLink domain."""
    return driver.bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_FABRIC


def granularity(device_index: int, handle_type: Any) -> int:
    """Return the multiple, in bytes, that suits sizes and addresses of allocations best."""
    flags = driver.bindings().CUmemAllocationGranularity_flags
    recommended = flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    properties = _properties(device_index, handle_type)
    return int(driver.call("cuMemGetAllocationGranularity", properties, recommended))


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def create(size: int, device_index: int, handle_type: Any, stack: ExitStack) -> Any:
    """Allocate `size` bytes that `handle_type` can share; return their handle."""
    handle = driver.call("cuMemCreate", size, _properties(device_index, handle_type), 0)
    driver.on_exit(stack, "cuMemRelease", handle)
    return handle


def export(handle: Any, handle_type: Any, stack: ExitStack) -> int | bytes:
    """Return a file descriptor, closed by `stack`, or the bytes of a FABRIC handle."""
    exported = driver.call("cuMemExportToShareableHandle", handle, handle_type, 0)
    if handle_type == fabric():
        return bytes(exported.data)
    stack.callback(os.close, int(exported))
    return int(exported)


def import_handle(exported: int | bytes, handle_type: Any, stack: ExitStack) -> Any:
    """Return a handle of this process to what another one exported; the descriptor stays open."""
    handle = driver.call("cuMemImportFromShareableHandle", exported, handle_type)
    driver.on_exit(stack, "cuMemRelease", handle)
    return handle


def reserve(size: int, alignment: int, stack: ExitStack) -> int:
    """Return a range of addresses, `size` bytes long, with nothing behind it yet."""
    address = int(driver.call("cuMemAddressReserve", size, alignment, 0, 0))
    driver.on_exit(stack, "cuMemAddressFree", address, size)
    return address


def map_at(address: int, handle: Any, size: int, device_index: int, stack: ExitStack) -> None:
    """Put the memory of `handle` behind `address`, for this device to read and write."""
    driver.call("cuMemMap", address, size, 0, handle, 0)
    driver.on_exit(stack, "cuMemUnmap", address, size)
    cuda = driver.bindings()
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device_index
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    driver.call("cuMemSetAccess", address, size, [access], 1)


def _properties(device_index: int, handle_type: Any) -> Any:
    cuda = driver.bindings()
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device_index
    properties.requestedHandleTypes = handle_type
    return properties
