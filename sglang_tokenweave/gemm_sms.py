"""Tell cuBLAS how many SMs it has: beside communication a GEMM for all of them loses a wave.

cuBLAS on Hopper launches persistent kernels, one CTA an SM. If some SMs are taken, the CTAs that
found no place run when others end, and the GEMM takes up to twice as long. For fewer SMs it picks
another grid, or another kernel.
"""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def beside(ctas: int, device: torch.device) -> AbstractContextManager[None]:
    """Return a context to capture GEMMs in that run beside so many CTAs of communication."""
    if ctas == 0 or device.type != "cuda":
        return nullcontext()
    return for_gemms(torch.cuda.get_device_properties(device).multi_processor_count - ctas)


@contextmanager
def for_gemms(num_sms: int) -> Iterator[None]:
    """Let cuBLAS and cuBLASLt choose for `num_sms` SMs what this thread launches meanwhile.

    For the time of a graph's capture: a captured kernel keeps its grid. Other threads must not run
    GEMMs, because cuBLASLt's number is the whole process's (torch keeps one).

    Args:
        num_sms: of the current device; at least 1.

    Raises:
        RuntimeError: cuBLAS refuses.
    """
    total = torch.cuda.get_device_properties().multi_processor_count
    before = torch._C._get_sm_carveout_experimental()
    _set_target(num_sms)  # linear layers without bias
    torch._C._set_sm_carveout_experimental(total - num_sms)  # those with bias, and FP8
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(before)
        _set_target(0)  # all


def _set_target(num_sms: int) -> None:
    handle = torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call] # torch's gap
    status = _cublas().cublasSetSmCountTarget(ctypes.c_void_p(handle), ctypes.c_int(num_sms))
    if status:
        raise RuntimeError(f"cublasSetSmCountTarget({num_sms}) returned status {status}")


def _cublas() -> ctypes.CDLL:
    """Return the cuBLAS that torch has loaded."""
    version = torch.version.cuda
    if version is None:
        raise RuntimeError("this torch has no CUDA")
    return ctypes.CDLL(f"libcublas.so.{version.partition('.')[0]}")
