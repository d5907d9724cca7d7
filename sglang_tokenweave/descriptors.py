"""Give every rank of one host a duplicate of every other rank's file descriptor, or of one's.

Every owner listens, and every other rank asks it once. The asker sends a proof that it is that
rank; the owner answers with a proof of its own and the descriptor. A proof is an HMAC of the
group's token over who speaks to whom, so that the token itself never travels and nothing can be
replayed. One thread serves and asks at the same time, so no order of arrival can deadlock.
"""

import errno
import hmac
import math
import os
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial

_RETRY_S = 0.02  # between two attempts to reach a rank that does not listen yet
_MAX_UNPROVEN = 64  # connections that have said nothing yet; a rank speaks as soon as it connects
_PROOF_BYTES = 32


class ExchangeError(RuntimeError):
    """Some rank's descriptor did not arrive; what had arrived is closed again."""


def new_token() -> str:
    """Return the secret of one exchange: rank 0 makes it, the caller broadcasts it."""
    return secrets.token_hex(32)


def exchange(
    descriptor: int, rank: int, world_size: int, token: str, deadline_s: float
) -> list[int]:
    """Return the descriptors of all ranks of this host, in rank order; a collective call.

    The caller closes all of them but its own: entry `rank` is `descriptor` itself.

    Args:
        token: the same on every rank, from `new_token`; one serves one exchange.
        deadline_s: how long to wait for the other ranks, in all.

    Raises:
        ExchangeError: naming the ranks that are missing at the deadline.
        ValueError: naming the argument, what came and what is allowed.
    """
    _check_arguments(descriptor, rank, world_size, token, deadline_s)
    return _run(_Exchange(descriptor, rank, world_size, token, range(world_size)), deadline_s)


def broadcast(
    descriptor: int | None, root: int, rank: int, world_size: int, token: str, deadline_s: float
) -> int:
    """Return the descriptor of rank `root`; like `exchange`, but only `root` brings one."""
    if (descriptor is None) == (rank == root):
        raise ValueError(f"descriptor is {descriptor} on rank {rank}; only rank {root} brings one")
    _check_arguments(descriptor, rank, world_size, token, deadline_s)
    return _run(_Exchange(descriptor, rank, world_size, token, [root]), deadline_s)[0]


def _run(running: "_Exchange", deadline_s: float) -> list[int]:
    deadline = time.monotonic() + deadline_s
    with closing(running):
        running.listen()
        while missing := running.missing():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ExchangeError(
                    f"rank {running.rank} of {running.world_size} exchanged no descriptors with "
                    f"rank(s) {', '.join(map(str, missing))} in {deadline_s:g} s: did they fail "
                    "(see their logs), and do all ranks run on one host, in one container (one "
                    "network namespace) and as one user?"
                )
            running.step(min(left_s, _RETRY_S))
        return running.take()


def _check_arguments(
    descriptor: int | None, rank: int, world_size: int, token: str, deadline_s: float
) -> None:
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be from 0 to {world_size - 1}")
    if len(token) < 32:
        raise ValueError(f"token has {len(token)} characters; it must be from new_token()")
    if not 0 < deadline_s < math.inf:
        raise ValueError(f"deadline_s is {deadline_s}; it must be positive and finite")
    try:
        if descriptor is not None:
            os.fstat(descriptor)
    except OSError as error:
        raise ValueError(f"descriptor is {descriptor}; it must be open ({error})") from error


class _Exchange:
    """One rank's side of an exchange, and the owner of all that it opened and received."""

    def __init__(
        self,
        descriptor: int | None,
        rank: int,
        world_size: int,
        token: str,
        owners: Sequence[int] = (),
    ) -> None:
        self._descriptor = descriptor
        self.rank = rank
        self.world_size = world_size
        self._key = token.encode()
        self._owners = set(owners) - {rank}
        self._unserved = set(range(world_size)) - {rank} if rank in owners else set()
        self._unasked = set(self._owners)  # or not answered
        self._received: dict[int, int] = {}
        self._ask_again_at = 0.0
        self._unproven: list[socket.socket] = []  # oldest first
        self._selector = selectors.PollSelector()  # owns no descriptor; holds every open socket

    def missing(self) -> list[int]:
        return sorted(self._unserved | (self._owners - self._received.keys()))

    def listen(self) -> None:
        if not self._unserved:
            return
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))
        listener.setblocking(False)
        try:
            listener.bind(self._address(self.rank))
        except OSError as error:
            raise ExchangeError(
                f"rank {self.rank} cannot listen ({error}): does another process hold this rank, "
                "or is the token in use?"
            ) from error
        listener.listen(socket.SOMAXCONN)

    def step(self, timeout_s: float) -> None:
        """Ask who is due, then handle what arrives within the time."""
        if time.monotonic() >= self._ask_again_at:
            for peer in sorted(self._unasked):
                self._ask(peer)
            self._ask_again_at = time.monotonic() + _RETRY_S
        for key, _ in self._selector.select(timeout_s):
            key.data()
        # One connection is accepted per step, so a flood of silent ones pushes out its own kind; a
        # rank that was pushed out with them asks again.
        if len(self._unproven) > _MAX_UNPROVEN:
            self._drop(self._unproven.pop(0))

    def take(self) -> list[int]:
        """Hand the descriptors over to the caller."""
        found, self._received = self._received, {}
        if self._descriptor is not None:
            found[self.rank] = self._descriptor
        return [found[rank] for rank in sorted(found)]

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            self._drop(key.fileobj)  # type: ignore[arg-type] # only sockets are registered
        for descriptor in self._received.values():
            os.close(descriptor)

    def _address(self, rank: int) -> bytes:
        # In the abstract namespace: it ends with the process, however that ends, and needs no
        # shared folder. It has no permissions and everyone can list it: hence the user and the
        # proof of each connection are checked. Before the rank listens, nobody can guess it.
        return b"\0sglang_tokenweave-" + self._hmac(f"address {rank}").hex().encode()

    def _proof(self, sender: int, receiver: int) -> bytes:
        return self._hmac(f"{sender} to {receiver}")

    def _hmac(self, text: str) -> bytes:
        return hmac.digest(self._key, text.encode(), "sha256")

    def _ask(self, peer: int) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        answer = partial(self._receive, connection, peer)
        self._selector.register(connection, selectors.EVENT_READ, answer)
        connection.setblocking(False)
        # Not listening yet, or a full queue: the next round asks again.
        with suppress(ConnectionError, BlockingIOError):
            connection.connect(self._address(peer))
            if _is_same_user(connection):
                connection.send(self._proof(self.rank, peer))
                self._unasked.remove(peer)
                return
        self._drop(connection)

    def _receive(self, connection: socket.socket, peer: int) -> None:
        proof, descriptors = b"", []
        with suppress(ConnectionError):  # the owner is gone or pushed this connection out
            # Not socket.recv_fds, which passes no flags on.
            proof, ancillary, _, _ = connection.recvmsg(
                _PROOF_BYTES, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC
            )
            descriptors = [struct.unpack("i", data)[0] for _, _, data in ancillary]
        self._drop(connection)
        if not hmac.compare_digest(proof, self._proof(peer, self.rank)):
            self._unasked.add(peer)
            for descriptor in descriptors:
                os.close(descriptor)
        elif not descriptors:
            raise ExchangeError(
                f"rank {peer} answered rank {self.rank} but its descriptor did not arrive: is the "
                "limit of open files (ulimit -n) reached?"
            )
        else:
            [self._received[peer]] = descriptors

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        if not _is_same_user(connection):
            connection.close()
            return
        self._selector.register(connection, selectors.EVENT_READ, partial(self._serve, connection))
        connection.setblocking(False)
        self._unproven.append(connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            # A plain recv: the kernel throws away descriptors that a stranger sends along.
            claim = connection.recv(_PROOF_BYTES)
            for peer in sorted(self._unserved):
                if hmac.compare_digest(claim, self._proof(peer, self.rank)):
                    assert self._descriptor is not None, "only owners listen"
                    answer = self._proof(self.rank, peer)
                    socket.send_fds(connection, [answer], [self._descriptor])
                    self._unserved.remove(peer)
        except OSError as error:
            # The asker is gone, or this user has too many descriptors in flight: it asks again.
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ETOOMANYREFS):
                raise
        self._unproven.remove(connection)
        self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()


def _is_same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, user, _ = struct.unpack("iII", credentials)
    return bool(user == os.geteuid())
