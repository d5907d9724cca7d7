"""Which transport a server gets: by name, if this machine and this model can have it."""

from collections.abc import Iterable
from typing import Any

import torch

from sglang_tokenweave import compiler
from sglang_tokenweave.config import describe, flag
from sglang_tokenweave.kernels import choose_variant
from sglang_tokenweave.peer import MulticastTransport, PeerTransport
from sglang_tokenweave.reference import ReferenceTransport
from sglang_tokenweave.transport import Transport

_BY_KERNEL: dict[str, type[PeerTransport]] = {
    transport.name: transport for transport in (PeerTransport, MulticastTransport)
}


def resolve(name: str, device: torch.device) -> str:
    """Return the transport that the option `transport` stands for on `device`."""
    return "reference" if name == "auto" and device.type == "cpu" else name


def reasons(
    name: str,
    device: torch.device,
    world_size: int,
    dtype: torch.dtype,
    hidden_size: int,
    norm_dtypes: Iterable[torch.dtype],
) -> tuple[str, ...]:
    """Return why the transport `name`, as resolved, cannot serve a model; empty if it can.

    Args:
        world_size: of the tensor-parallel group.
        dtype: of the activations.
        norm_dtypes: of the weights of the model's norms.
    """
    if name == "reference":
        return ()
    if name == "auto":
        named = " or ".join((*_BY_KERNEL, ReferenceTransport.name))
        return (
            "no device transport has been timed in a server yet, so stock runs "
            f"({flag('transport')} {named} weaves all the same)",
        )
    if device.type == "cpu":
        return (
            f"{describe('transport')} is {name!r}, which moves bytes between GPUs, "
            f"but this server runs on a CPU: use {ReferenceTransport.name}",
        )
    try:
        compiler.architecture(*torch.cuda.get_device_capability(device))
        is_multicast = name == MulticastTransport.name
        choose_variant(dtype, world_size, hidden_size, is_multicast=is_multicast)
    except ValueError as error:
        return (f"transport {name}: {error}",)
    others = sorted({str(each) for each in norm_dtypes if each != dtype})
    if others:
        return (f"transport {name}: norms are {', '.join(others)} and activations {dtype}",)
    return ()


def create(name: str, device: torch.device, group: Any, *, engine: str = "kernel") -> Transport:
    """Make the transport `name`, as resolved; a collective call of SGLang's `group`.

    Args:
        engine: of a device transport, beside a computation: as of `PeerTransport`.
        group: SGLang's GroupCoordinator of the tensor-parallel ranks.

    Raises:
        DisagreementError: on all ranks, when their GPUs cannot share memory.
    """
    if name == ReferenceTransport.name:
        return ReferenceTransport.create(device, group.ranks)
    return _BY_KERNEL[name](group.cpu_group, device, engine=engine)
