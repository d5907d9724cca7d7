"""Find ports for a server on this machine."""

import random
import socket
from collections.abc import Collection

HOST = "127.0.0.1"
BLOCK = 16  # SGLang counts up from --dist-init-addr
# Below the ephemeral ports (32768 up), so that no outgoing connection takes one meanwhile.
BASES = range(20000, 32000, BLOCK)


def free_block(taken: Collection[int] = ()) -> int | None:
    """Return a port of BASES that is free with its next 15; None: no such block is.

    Args:
        taken: first ports of blocks that belong to servers which have not bound them yet.
    """
    for base in random.Random().sample(BASES, len(BASES)):
        if base not in taken and all(map(is_free, range(base, base + BLOCK))):
            return base
    return None


def is_free(port: int) -> bool:
    """Say whether nobody listens on a port."""
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((HOST, port))
        except OSError:
            return False
    return True
