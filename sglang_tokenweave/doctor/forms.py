"""The transports that the self-test can run: how one is made, and the bytes that it moves."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_tokenweave.switches import why_multicast_is_forbidden


def multicast_switches(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return every switch, as `NAME=value`, with which the operator forbids multicast."""
    one_by_one = (why_multicast_is_forbidden({name: value}) for name, value in environment.items())
    return tuple(sorted(switch for switch in one_by_one if switch))


def make_peer(group: Any, device: Any) -> Any:
    """Return the unicast transport."""
    from sglang_tokenweave.peer import PeerTransport

    return PeerTransport(group, device)


def make_multicast(group: Any, device: Any) -> Any:
    """Return the multicast transport.

    Raises:
        RuntimeError: one of the operator's switches forbids it.
    """
    switches = multicast_switches()
    if switches:  # again: this is another process than the one that was asked
        raise RuntimeError(f"multicast is switched off: {', '.join(switches)}")
    from sglang_tokenweave.peer import MulticastTransport

    return MulticastTransport(group, device)


@dataclass(frozen=True)
class Form:
    """A transport under test and the bytes that it moves."""

    make: Callable[[Any, Any], Any]
    traffic: Callable[[int], float]  # ranks -> bytes a GPU sends, per byte of activations


FORMS = {
    "peer": Form(make_peer, lambda ranks: 2 * (ranks - 1) / ranks),
    "multicast": Form(make_multicast, lambda ranks: 1 + 1 / ranks),
}
