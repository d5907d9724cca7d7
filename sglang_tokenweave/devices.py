"""The device of each rank: its context, where it is, and whether the others reach it."""

import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_tokenweave import driver

logger = logging.getLogger(__name__)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Place:
    """Where a rank runs: ordinals differ between processes, these names do not."""

    host: str  # the running kernel and the network namespace: descriptors travel within one
    device: str  # the GPU's UUID, in hexadecimal


def retain_context(device_index: int, stack: ExitStack) -> Any:
    """Return the device's primary context, the one that torch uses; `stack` lets it go."""
    driver.call("cuInit", 0)
    device = driver.call("cuDeviceGet", device_index)
    context = driver.call("cuDevicePrimaryCtxRetain", device)
    driver.on_exit(stack, "cuDevicePrimaryCtxRelease", device)
    return context


@contextmanager
def current(context: Any) -> Iterator[None]:
    """Make `context` this thread's current one for a while."""
    with ExitStack() as stack:
        driver.call("cuCtxPushCurrent", context)
        driver.on_exit(stack, "cuCtxPopCurrent")
        yield


def is_context_alive(device_index: int) -> bool:
    """Return whether there is still something to release on the device."""
    if sys.is_finalizing():
        return False
    try:
        device = driver.call("cuDeviceGet", device_index)
        _, active = driver.call("cuDevicePrimaryCtxGetState", device)
    except driver.CudaError:
        return False
    return bool(active)


def has_attribute(device_index: int, name: str) -> bool:
    """Return whether the device has a feature, by the end of the attribute's name."""
    attribute = getattr(driver.bindings().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    device = driver.call("cuDeviceGet", device_index)
    return bool(driver.call("cuDeviceGetAttribute", attribute, device))


def place(device_index: int) -> Place:
    """Return where this process runs on this device."""
    return Place(_host(), _uuid(device_index))


def check_peer_access(device_index: int, places: Sequence[Place]) -> None:
    """Check that this device reads and writes the memory of all others on this host.

    A device that CUDA_VISIBLE_DEVICES hides from this process cannot be asked about. It is taken
    for reachable, since mapping does not need it to be visible; where it is not reachable, mapping
    its memory fails, on all ranks together.

    Raises:
        CudaError: naming the ranks whose devices it does not reach.
    """
    here = place(device_index)
    ordinals = {_uuid(index): index for index in range(driver.call("cuDeviceGetCount"))}
    device = driver.call("cuDeviceGet", device_index)
    unreachable = []
    for rank, there in enumerate(places):
        if there.host != here.host or there.device == here.device:
            continue
        if there.device not in ordinals:
            logger.info("rank %d's GPU is not visible here: peer access is not checked", rank)
            continue
        peer = driver.call("cuDeviceGet", ordinals[there.device])
        if not driver.call("cuDeviceCanAccessPeer", device, peer):
            unreachable.append(rank)
    if unreachable:
        raise driver.CudaError(
            f"cuDeviceCanAccessPeer: GPU {device_index} has no peer access to the GPU of rank(s) "
            f"{', '.join(map(str, unreachable))}; check `nvidia-smi topo -p2p rw`"
        )


def _host() -> str:
    try:
        kernel = _BOOT_ID.read_text().strip()
        namespace = os.stat("/proc/self/ns/net")
    except OSError:  # some sandboxes hide them
        return platform.node()
    return f"{kernel} {namespace.st_dev}:{namespace.st_ino}"


def _uuid(device_index: int) -> str:
    identity = driver.call("cuDeviceGetUuid", driver.call("cuDeviceGet", device_index))
    return bytes(identity.bytes).hex()
