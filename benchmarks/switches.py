"""The operator's switches against NVLink multicast, and the one place that obeys them here."""

from collections.abc import Mapping, MutableMapping

from sglang_tokenweave.switches import why_multicast_is_forbidden

# Any one of these means: no process of this run touches multicast.
SWITCHES = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


class MulticastForbiddenError(RuntimeError):
    """Something that uses NVLink multicast was about to start while a switch forbids it."""


def spread(environment: MutableMapping[str, str]) -> None:
    """Set all switches if any is set: each library reads only its own."""
    if why_multicast_is_forbidden(environment):
        environment.update(SWITCHES)


def check(what: str, uses_multicast: bool, environment: Mapping[str, str]) -> None:
    """Refuse `what` if it uses multicast, or might, while a switch forbids it.

    Raises:
        MulticastForbiddenError: naming the switch.
    """
    switch = why_multicast_is_forbidden(environment)
    if switch is None:
        return
    if uses_multicast:
        raise MulticastForbiddenError(f"{what} uses NVLink multicast, which {switch} forbids")
    missing = [name for name, value in SWITCHES.items() if environment.get(name) != value]
    if missing:
        raise MulticastForbiddenError(
            f"{what} is not started: {switch} forbids NVLink multicast, but the libraries that "
            f"read {' and '.join(missing)} would not know"
        )
