"""The CUDA driver through cuda-python: every call checked, every error with its remedy."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

_REMEDIES = {
    "CUDA_ERROR_NOT_PERMITTED": "this container lacks a permission that the call needs",
    "CUDA_ERROR_NOT_SUPPORTED": "the GPU or its driver lacks this feature",
    "CUDA_ERROR_OUT_OF_MEMORY": "free GPU memory, or lower --mem-fraction-static",
    "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED": "no peer access: check `nvidia-smi topo -p2p rw`",
    "CUDA_ERROR_SYSTEM_NOT_READY": "start the fabric manager (nvidia-fabricmanager)",
    "CUDA_ERROR_INVALID_DEVICE": "the GPUs are not in one NVLink domain",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel stopped itself: its message is in this process's output",
}


class CudaError(RuntimeError):
    """A driver call failed; the text names the call, the error and what to do."""


@cache
def bindings() -> Any:
    """Return cuda-python's driver module.

    Raises:
        CudaError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        text = f"cuda-python is missing: pip install 'cuda-python>=13' ({error})"
        raise CudaError(text) from error
    return driver


def call(name: str, *arguments: Any) -> Any:
    """Call a driver function by name and return its value, tuple of values, or None.

    Raises:
        CudaError: it did not return CUDA_SUCCESS.
    """
    status, *values = getattr(bindings(), name)(*arguments)
    if status != bindings().CUresult.CUDA_SUCCESS:
        remedy = _REMEDIES.get(status.name)
        raise CudaError(
            f"{name}: {status.name} ({int(status)})" + (f"; {remedy}" if remedy else "")
        )
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def shared_limit_bytes(device: int) -> int:
    """Return the shared memory that one thread block may have on a device, by ordinal."""
    limit = bindings().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(call("cuDeviceGetAttribute", limit, call("cuDeviceGet", device)))


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel and how it is launched."""

    function: Any
    num_threads: int
    shared_bytes: int
    library: Any  # kept: the kernel lives as long as its library

    @classmethod
    def load(
        cls, cubin: bytes, name: str, *, num_threads: int, shared_bytes: int, device: int
    ) -> "Kernel":
        """Load `name` from a cubin for the current context.

        Args:
            num_threads: per block.
            shared_bytes: dynamic shared memory per block.
            device: ordinal of the device it will run on.
        """
        library = call("cuLibraryLoadData", cubin, [], [], 0, [], [], 0)
        kernel = call("cuLibraryGetKernel", library, name.encode())
        attribute = bindings().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        call("cuKernelSetAttribute", attribute, shared_bytes, kernel, call("cuDeviceGet", device))
        return cls(call("cuKernelGetFunction", kernel), num_threads, shared_bytes, library)

    def launch(self, stream: int, num_blocks: int, parameters: ctypes.Structure) -> None:
        """Launch `num_blocks` blocks in clusters of two, with one struct as the only argument."""
        # The driver copies the struct before it returns.
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        call(
            "cuLaunchKernelEx",
            _launch_config(stream, num_blocks, self.num_threads, self.shared_bytes),
            self.function,
            ctypes.addressof(pointers),
            0,
        )


@cache
def _launch_config(stream: int, num_blocks: int, num_threads: int, shared_bytes: int) -> Any:
    driver = bindings()
    cluster = driver.CUlaunchAttribute()
    cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster.value.clusterDim.x = 2
    cluster.value.clusterDim.y = 1
    cluster.value.clusterDim.z = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = num_blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = stream
    config.attrs = [cluster]
    config.numAttrs = 1
    return config


def on_exit(stack: Any, name: str, *arguments: Any) -> None:
    """Call a driver function when `stack` (an ExitStack) unwinds; failures there are not raised."""
    release: Callable[..., Any] = getattr(bindings(), name)
    stack.callback(release, *arguments)
