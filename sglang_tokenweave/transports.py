"""Which transport a server gets: by name, if this machine and this model can have it."""

from collections.abc import Iterable
from typing import Any

import torch

from sglang_tokenweave import compiler
from sglang_tokenweave.agreement import DisagreementError
from sglang_tokenweave.config import describe, flag
from sglang_tokenweave.kernels import choose_variant
from sglang_tokenweave.peer import MulticastTransport, PeerTransport
from sglang_tokenweave.reference import ReferenceTransport
from sglang_tokenweave.transport import SymmetricBuffer, Transport

_BY_KERNEL: dict[str, type[PeerTransport]] = {
    transport.name: transport for transport in (PeerTransport, MulticastTransport)
}


def resolve(name: str, device: torch.device, *, is_measured: bool) -> str:
    """Return the transport that the option `transport` stands for on `device`.

    Args:
        is_measured: whether a tuned table decides, which weaves only what was faster than stock.
    """
    if name != "auto":
        return name
    if device.type == "cpu":
        return ReferenceTransport.name
    return PeerTransport.name if is_measured else name


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
            "on GPUs stock runs where nobody measured what is faster: leave thresholds and "
            f"{flag('tune')} away ({flag('transport')} {named} weaves all the same)",
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


def create(
    name: str,
    device: torch.device,
    group: Any,
    capacity: int,
    hidden_size: int,
    dtype: torch.dtype,
    *,
    has_copy_engines: bool,
    has_one_shot: bool,
) -> tuple[Transport, SymmetricBuffer]:
    """Make the transport `name`, as resolved, and its buffer; a collective call of `group`.

    Args:
        group: SGLang's GroupCoordinator of the tensor-parallel ranks.
        capacity, hidden_size, dtype: as of `Transport.allocate`.
        has_copy_engines, has_one_shot: of a device transport, as of `PeerTransport`.

    Raises:
        DisagreementError: on all ranks, when their GPUs cannot share memory.
    """
    transport: Transport
    if name == ReferenceTransport.name:
        transport = ReferenceTransport.create(device, group.ranks)
    else:
        transport = _BY_KERNEL[name](
            group.cpu_group,
            device,
            has_copy_engines=has_copy_engines,
            has_one_shot=has_one_shot,
            # Nobody has measured it against a switch that adds.
            has_two_shot=name == PeerTransport.name,
        )
    try:
        return transport, transport.allocate(capacity, hidden_size, dtype)
    except DisagreementError:
        transport.close()
        raise
