"""A kernel from its source onto a device."""

import torch

from sglang_tokenweave import compiler
from sglang_tokenweave.driver import Kernel


def ordinal(device: torch.device) -> int:
    """Return the number of a CUDA device in this process; the current one's if it has none."""
    return torch.cuda.current_device() if device.index is None else device.index


def load_kernel(
    file: str,
    expression: str,
    device: torch.device,
    *,
    num_threads: int,
    shared_bytes: int = 0,
) -> Kernel:
    """Compile a kernel and load it on `device`, which is the current one.

    Args:
        file, expression: as of `compiler.compile_kernel`.
        num_threads, shared_bytes: as of `Kernel.load`.

    Raises:
        CompileError, CudaError: as the text says.
    """
    arch = compiler.architecture(*torch.cuda.get_device_capability(device))
    compiled = compiler.compile_kernel(file, expression, arch)
    return Kernel.load(
        compiled.cubin,
        compiled.name,
        num_threads=num_threads,
        shared_bytes=shared_bytes,
        device=ordinal(device),
    )
