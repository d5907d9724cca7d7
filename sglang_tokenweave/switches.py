"""The operator's switches against NVSwitch multicast, those that NCCL, torch and NVSHMEM obey."""

from collections.abc import Mapping

_NO = frozenset({"no", "n", "false", "f", "off"})
# Name, and whether a "no" means that multicast is off.
_SWITCHES = (
    ("NCCL_NVLS_ENABLE", True),
    ("TORCH_SYMM_MEM_DISABLE_MULTICAST", False),
    ("NVSHMEM_DISABLE_NVLS", False),
)


def why_multicast_is_forbidden(environment: Mapping[str, str]) -> str | None:
    """Return the switch that forbids multicast, as `NAME=value`, or None when it may be used.

    An empty value is an unset switch. A number counts as no when it is zero; the words no, n,
    false, f and off, in any case, count as no. NCCL_NVLS_ENABLE allows multicast with any other
    number (2 is NCCL's own default) and forbids it with anything else; the two DISABLE switches
    forbid it with anything but a no. So a value that cannot be read forbids: whoever set it wanted
    something, and doing without multicast is never wrong.
    """
    for name, no_forbids in _SWITCHES:
        value = environment.get(name, "").strip()
        if value and _forbids(value, no_forbids=no_forbids):
            return f"{name}={value}"
    return None


def _forbids(value: str, *, no_forbids: bool) -> bool:
    try:
        is_no = int(value, 0) == 0
    except ValueError:
        return no_forbids or value.lower() not in _NO
    return is_no == no_forbids
