"""Ask the CUDA driver. No context is created, so no GPU memory is taken."""

import uuid
from typing import Any

from sglang_tokenweave import driver
from sglang_tokenweave.doctor.facts import Cuda, Gpu


def gather() -> Cuda:
    """Return what the driver says.

    Raises:
        CudaError: cuda-python is missing or the driver refused.
        RuntimeError: the driver's library is not here.
    """
    driver.call("cuInit", 0)
    version = int(driver.call("cuDriverGetVersion"))
    devices = [driver.call("cuDeviceGet", i) for i in range(driver.call("cuDeviceGetCount"))]
    return Cuda(
        version=(version // 1000, version % 1000 // 10),
        gpus=tuple(_gpu(device) for device in devices),
        peers=tuple(tuple(_reaches(a, b) for b in devices) for a in devices),
    )


def _gpu(device: Any) -> Gpu:
    return Gpu(
        name=driver.call("cuDeviceGetName", 96, device).split(b"\0")[0].decode(),
        uuid=f"GPU-{uuid.UUID(bytes=bytes(driver.call('cuDeviceGetUuid', device).bytes))}",
        num_sms=_attribute(device, "MULTIPROCESSOR_COUNT"),
        capability=(
            _attribute(device, "COMPUTE_CAPABILITY_MAJOR"),
            _attribute(device, "COMPUTE_CAPABILITY_MINOR"),
        ),
        shares_memory=bool(
            _attribute(device, "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")
            and _attribute(device, "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")
        ),
        has_fabric_handles=bool(_attribute(device, "HANDLE_TYPE_FABRIC_SUPPORTED")),
        has_multicast=bool(_attribute(device, "MULTICAST_SUPPORTED")),
    )


def _attribute(device: Any, name: str) -> int:
    attribute = getattr(driver.bindings().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(driver.call("cuDeviceGetAttribute", attribute, device))


def _reaches(device: Any, peer: Any) -> bool:
    return device is peer or bool(driver.call("cuDeviceCanAccessPeer", device, peer))
