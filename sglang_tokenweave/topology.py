"""Whether the ranks of a tensor-parallel group are where their transport can reach."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Host:
    """The machine a rank runs on; containers of one machine have names of their own, and one id."""

    name: str
    boot_id: str

    @classmethod
    def this(cls) -> "Host":
        """Describe this machine."""
        name = socket.gethostname()
        return cls(name, _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else name)


def reason(hosts: Sequence[Host], transport: str, *, shares_nvlink_domain: bool) -> str | None:
    """Return why `transport` cannot serve a group of one rank on each of `hosts`, or None.

    Args:
        hosts: of the ranks of one tensor-parallel group, in rank order.
        transport: its name; `reference` goes wherever torch.distributed goes.
        shares_nvlink_domain: memory of all ranks can be mapped on all of them across hosts.
    """
    names = {host.boot_id: host.name for host in reversed(hosts)}
    if len(names) == 1 or transport == "reference" or shares_nvlink_domain:
        return None
    listed = ", ".join(names[boot_id] for boot_id in dict.fromkeys(h.boot_id for h in hosts))
    return (
        f"the ranks of this tensor-parallel group are on {len(names)} hosts ({listed}) that share "
        "no NVLink domain: keep --tp within a host and spread --pp-size or replicas over hosts"
    )
