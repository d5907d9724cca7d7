"""Arbitrary messages on both sides of an exchange of descriptors: nothing is given, nor taken."""

import os
import socket
from contextlib import closing, suppress

from exchanging import address, open_descriptors, proof
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_tokenweave.descriptors import _Exchange, new_token

fuzz = settings(deadline=None, derandomize=True, max_examples=200)
TOKEN = new_token()
PROOF = proof(TOKEN, 1, 0)  # what rank 1 says to rank 0
ANSWER = proof(TOKEN, 0, 1)
OVERSIZED = b"\0" * 60_000  # the kernel takes no message much longer


def damaged(message):
    """Return what resembles a good message: pieces of it, and flipped bits."""
    pieces = st.slices(len(message)).map(message.__getitem__)
    flipped = st.integers(0, 8 * len(message) - 1).map(
        lambda place: (int.from_bytes(message) ^ 1 << place).to_bytes(len(message))
    )
    others = st.sampled_from([proof(TOKEN, 1, 1), proof(TOKEN, 0, 0), TOKEN.encode()])
    return (st.binary(max_size=200) | pieces | flipped | others).filter(lambda m: m != message)


def until_closed(running, connection):
    """Let the exchange work until it hangs up; return the bytes and descriptors that came."""
    connection.setblocking(False)
    for _ in range(100):
        running.step(0.01)
        with suppress(BlockingIOError):
            try:
                return socket.recv_fds(connection, 4096, 16)[:2]
            except ConnectionResetError:  # it did not even read
                return b"", []
    raise TimeoutError("the exchange keeps a stranger's connection")


def connect_to(rank):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address(TOKEN, rank))
    return connection


@given(st.lists(st.tuples(damaged(PROOF), st.integers(0, 3)), max_size=4))
@example([(OVERSIZED, 3), (b"", 0), (PROOF[:-1], 1), (ANSWER, 0)])
@fuzz
def test_an_owner_gives_nothing_for_a_wrong_message(messages):
    before = open_descriptors()
    with closing(_Exchange(0, 0, 2, TOKEN, [0])) as running:
        running.listen()
        for message, num_descriptors in messages:
            with connect_to(0) as stranger:
                socket.send_fds(stranger, [message], [1] * num_descriptors)
                assert until_closed(running, stranger) == (b"", [])
        assert running.missing() == [1]
        with connect_to(0) as rank:  # which is served all the same
            rank.send(PROOF)
            data, received = until_closed(running, rank)
            assert (data, len(received)) == (ANSWER, 1)
            os.close(received[0])
        assert running.missing() == []
    assert open_descriptors() == before


@given(st.lists(st.tuples(damaged(ANSWER), st.integers(0, 3)), max_size=4))
@example([(OVERSIZED, 3), (b"", 0), (ANSWER[:-1], 1), (PROOF, 1)])
@fuzz
def test_an_asker_takes_nothing_with_a_wrong_answer(answers):
    before = open_descriptors()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        closing(_Exchange(None, 1, 2, TOKEN, [0])) as running,
    ):
        listener.bind(address(TOKEN, 0))
        listener.listen()
        for message, num_descriptors in answers:
            _answer(running, listener, message, num_descriptors)
            assert running.missing() == [0]
        _answer(running, listener, ANSWER, 1)
        [received] = running.take()
        os.close(received)
    assert open_descriptors() == before


def _answer(running, listener, message, num_descriptors):
    """Let the asker ask at once, and answer it."""
    running._ask_again_at = 0.0
    running.step(0)
    connection, _ = listener.accept()
    with connection:
        assert connection.recv(4096) == PROOF
        socket.send_fds(connection, [message], [1] * num_descriptors)
    running._ask_again_at = float("inf")
    running.step(1)
