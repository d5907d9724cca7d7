"""The CUDA driver through cuda-python: every call checked, every error with its remedy."""

import ctypes
import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

from sglang_tokenweave.remedies import remedy
from sglang_tokenweave.switches import why_multicast_is_forbidden

logger = logging.getLogger(__name__)
_MULTICAST = "cuMulticast"


class CudaError(RuntimeError):
    """A driver call failed; the text names the call, the error and what to do."""

    def __init__(self, text: str, error: str | None = None) -> None:
        super().__init__(text)
        self.error = error  # "CUDA_ERROR_...", None when the driver was not reached


class MulticastForbiddenError(CudaError):
    """A multicast call was not made, because an operator's switch forbids it."""


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

    Every driver call of this package comes through here, so this is where multicast is forbidden.

    Raises:
        MulticastForbiddenError: naming the switch.
        CudaError: it did not return CUDA_SUCCESS.
    """
    if name.startswith(_MULTICAST) and (switch := why_multicast_is_forbidden(os.environ)):
        raise MulticastForbiddenError(
            f"{name} is not called: {switch} forbids multicast; unset it to allow multicast"
        )
    function = getattr(bindings(), name, None)
    if function is None:
        raise CudaError(f"cuda-python has no {name}: pip install 'cuda-python>=13'")
    try:
        status, *values = function(*arguments)
    except RuntimeError as error:  # cuda-python finds no libcuda, or one without this function
        raise CudaError(f"{name}: {error}") from error
    if status != bindings().CUresult.CUDA_SUCCESS:
        advice = remedy(name, status.name)
        text = f"{name}: {status.name} ({int(status)})" + (f"; {advice}" if advice else "")
        raise CudaError(text, status.name)
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def shared_limit_bytes(device: int) -> int:
    """Return the shared memory that one thread block may have on a device, by ordinal."""
    limit = bindings().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(call("cuDeviceGetAttribute", limit, call("cuDeviceGet", device)))


def on_exit(stack: ExitStack, name: str, *arguments: Any) -> None:
    """Call a driver function when `stack` unwinds; a failure there is logged and not raised."""
    stack.callback(_release, name, *arguments)


def _release(name: str, *arguments: Any) -> None:
    try:
        call(name, *arguments)
    except CudaError as error:
        # It undoes something, after a failure or at the end: the rest must be undone, too.
        logger.debug("not released: %s", error)


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
        function = call("cuKernelGetFunction", kernel)
        # Now: a first launch that loads it waits for kernels, which may be waiting for this rank.
        call("cuFuncLoad", function)
        return cls(function, num_threads, shared_bytes, library)

    def launch(
        self,
        stream: int,
        num_blocks: int,
        parameters: ctypes.Structure,
        *,
        in_pairs: bool = True,
        starts_early: bool = False,
    ) -> None:
        """Launch blocks with one struct as the only argument.

        Args:
            in_pairs: in clusters of two.
            starts_early: the blocks may start beside the end of the kernel before, which the
                kernel has to wait for ("programmatic dependent launch").
        """
        config = _launch_config(
            stream, num_blocks, self.num_threads, self.shared_bytes, in_pairs, starts_early
        )
        # The driver copies the struct before it returns.
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        call("cuLaunchKernelEx", config, self.function, ctypes.addressof(pointers), 0)


def _pairs_attribute() -> Any:
    attribute = bindings().CUlaunchAttribute()
    attribute.id = bindings().CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x = 2
    attribute.value.clusterDim.y = 1
    attribute.value.clusterDim.z = 1
    return attribute


def _early_attribute() -> Any:
    attribute = bindings().CUlaunchAttribute()
    ids = bindings().CUlaunchAttributeID
    attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


@cache
def _launch_config(
    stream: int,
    num_blocks: int,
    num_threads: int,
    shared_bytes: int,
    in_pairs: bool,
    starts_early: bool,
) -> Any:
    config = bindings().CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = num_blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = stream
    config.attrs = [_pairs_attribute()] * in_pairs + [_early_attribute()] * starts_early
    config.numAttrs = len(config.attrs)
    return config
