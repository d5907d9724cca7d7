"""What an op is given, checked before anything is launched."""

import torch


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    alignment: int = 16,
) -> None:
    """Refuse a tensor that a kernel would misread.

    Args:
        name: of the operand, for the error.
        alignment: of its first element, in bytes.

    Raises:
        ValueError: naming what came and what is allowed.
    """
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}; expected {shape} {dtype}"
        )
    if not tensor.is_contiguous() or tensor.data_ptr() % alignment:
        raise ValueError(f"{name} must be contiguous and aligned to {alignment} bytes")
