"""One address for the memory of all ranks: an NVSwitch multicast object, made together.

The order of the calls is the driver's: binding and mapping block until every device was added, so
the ranks vote before they go on to what would wait for a rank that failed.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from sglang_tokenweave import devices, driver, virtual_memory
from sglang_tokenweave.agreement import step
from sglang_tokenweave.sharing import Member, hand_out
from sglang_tokenweave.switches import why_multicast_is_forbidden

T = TypeVar("T")

# The fabric manager may be busy or starting. More than this is an outage: unicast works meanwhile.
_PAUSES_S = (0.25, 1.0, 4.0)


def granularity(member: Member, num_bytes: int) -> int:
    """Return the multiple, in bytes, that suits sizes and addresses of a multicast object best.

    Raises:
        CudaError: multicast is forbidden or not supported for this group; the text says why.
    """
    if switch := why_multicast_is_forbidden(os.environ):
        raise driver.MulticastForbiddenError(f"{switch} forbids multicast")
    if len({place.device for place in member.places}) < len(member.places):
        raise driver.CudaError("ranks share a GPU; multicast needs a GPU for each")
    if len(member.places) < 2:
        raise driver.CudaError("there is one rank; multicast needs at least two")
    if not devices.has_attribute(member.device_index, "MULTICAST_SUPPORTED"):
        raise driver.CudaError(f"GPU {member.device_index} has no NVSwitch multicast")
    flags = driver.bindings().CUmulticastGranularity_flags
    recommended = flags.CU_MULTICAST_GRANULARITY_RECOMMENDED
    properties = _properties(member, num_bytes)
    return int(driver.call("cuMulticastGetGranularity", properties, recommended))


def attach(member: Member, memory: Any, size: int, alignment: int, stack: ExitStack) -> int:
    """Return an address behind which the memory of all ranks is; a collective call.

    Only `multimem` instructions may touch it: a plain access to it is undefined.

    Args:
        memory: handle of this rank's memory, `size` bytes.
        alignment: of the address, in bytes.
        stack: takes all of it down again, in the reverse order.

    Raises:
        DisagreementError: on all ranks, when a step failed on any. `stack` then undoes the rest.
    """
    with ExitStack() as kept:
        multicast = _create(member, size, kept)
        addresses = kept.enter_context(ExitStack())  # freed after unbinding

        def add() -> None:
            device = driver.call("cuDeviceGet", member.device_index)
            driver.call("cuMulticastAddDevice", multicast, device)

        def bind() -> None:
            device = driver.call("cuDeviceGet", member.device_index)
            driver.call("cuMulticastBindMem", multicast, 0, memory, 0, size, 0)
            driver.on_exit(kept, "cuMulticastUnbind", multicast, device, 0, size)

        def map_it() -> int:
            address = virtual_memory.reserve(size, alignment, addresses)
            virtual_memory.map_at(address, multicast, size, member.device_index, kept)
            return address

        _retried_step("adding the GPU", member, add)
        _retried_step("binding memory", member, bind)
        address = step("mapping the multicast object", member.group, map_it)
        stack.push(kept.pop_all())
        return address


def _create(member: Member, size: int, kept: ExitStack) -> Any:
    """Return this rank's handle to the object that rank 0 creates.

    Rank 0 keeps its own until all have imported theirs. If it let go earlier, a late rank would
    import a new and empty object, and binding to that blocks for ever.
    """
    is_creator = member.group.rank == 0

    def create() -> Any:
        if not is_creator:
            return None
        multicast = driver.call("cuMulticastCreate", _properties(member, size))
        driver.on_exit(kept, "cuMemRelease", multicast)
        return multicast

    with ExitStack() as temporary:
        created = _retried_step("creating the multicast object", member, create)
        exported = step(
            "exporting the multicast object",
            member.group,
            lambda: (
                virtual_memory.export(created, member.handle_type, temporary)
                if is_creator
                else None
            ),
        )
        received = hand_out(member, exported, temporary)
        return step(
            "importing the multicast object",
            member.group,
            lambda: (
                created
                if is_creator
                else virtual_memory.import_handle(received, member.handle_type, kept)
            ),
        )


def _retried_step(name: str, member: Member, action: Callable[[], T]) -> T:
    return step(name, member.group, action, is_transient=_is_transient, pauses_s=_PAUSES_S)


def _is_transient(error: Exception) -> bool:
    return getattr(error, "error", None) == "CUDA_ERROR_SYSTEM_NOT_READY"


def _properties(member: Member, size: int) -> Any:
    properties = driver.bindings().CUmulticastObjectProp()
    properties.numDevices = len(member.places)
    properties.size = size
    properties.handleTypes = int(member.handle_type)
    properties.flags = 0
    return properties
