"""The exchange of file descriptors among strangers: crowds, other users, stolen places."""

import os
import random
import resource
import socket
import time
from contextlib import contextmanager, suppress
from threading import Thread

import pytest
from exchanging import PATIENCE_S, Ranks, address, all_met, meet, open_descriptors, proof

from sglang_tokenweave.descriptors import ExchangeError, exchange, new_token


@contextmanager
def squatter(token, rank, answer):
    """Listen where `rank` would, and call `answer(connection)` on everyone who connects."""

    def serve():
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(ConnectionError):
                    answer(connection)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address(token, rank))
        listener.listen()
        thread = Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def connect(token, rank):
    """Connect to a rank as a stranger would, as soon as it listens."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(address(token, rank))
        except ConnectionError:
            connection.close()
            time.sleep(0.01)
        else:
            return connection
    raise TimeoutError(f"rank {rank} does not listen")


def answer_to(connection, message):
    """Return all that comes back for a message: the bytes and the number of descriptors."""
    with connection, suppress(ConnectionError):
        connection.settimeout(PATIENCE_S)
        connection.send(message)
        data, received, _, _ = socket.recv_fds(connection, 4096, 16)
        for descriptor in received:
            os.close(descriptor)
        return data, len(received)
    return b"", 0


def _flood(_, token, world_size, connections):
    """Connect again and again, and never say anything."""
    held = []
    while True:
        for rank in range(world_size):
            held.append(connect(token, rank))
        while len(held) > connections:
            held.pop(0).close()


def _babble(_, token, world_size):
    """Send garbage, empty and long messages and descriptors, as fast as it goes."""
    noise = random.Random(0)
    _limit_open_files(100)  # so many descriptors in flight are left to the ranks, of the same user
    while True:
        for rank in range(world_size):
            message = noise.randbytes(noise.choice([0, 1, 31, 32, 33, 10_000]))
            with connect(token, rank) as connection, suppress(OSError):
                socket.send_fds(connection, [message], [0] * noise.choice([0, 1, 20]))


def _meet_with_few_descriptors(*arguments):
    """Meet in a process that cannot keep all those connections open."""
    _limit_open_files(250)
    return meet(*arguments)


def _limit_open_files(limit):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


@pytest.mark.parametrize(
    ("strangers", "arguments"),
    [(_flood, (900,)), (_flood, (1,)), (_babble, ())],
    ids=["silent", "hasty", "babbling"],
)
def test_many_strangers_neither_stop_nor_starve_an_exchange(strangers, arguments):
    token = new_token()
    # The last rank is late, so that the others are under attack when it comes.
    crowd = Ranks(strangers, range(4), token, 3, *arguments)
    try:
        late_s = {3: 1.0}
        ranks = Ranks(_meet_with_few_descriptors, range(4), 4, token, PATIENCE_S, late_s)
        assert ranks.outcomes() == all_met(4)
    finally:
        crowd.kill()


def _as_nobody(rank, function, *arguments):
    os.setuid(65534)
    return function(rank, *arguments)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("strangers", "arguments"),
    [(_flood, (900,)), (_flood, (1,)), (_babble, ())],
    ids=["silent", "hasty", "babbling"],
)
def test_a_crowd_of_another_user_changes_nothing(strangers, arguments):
    """Neither an exchange that succeeds nor one that fails, at its deadline, for another reason."""
    good, lacking = new_token(), new_token()
    crowds = [Ranks(_as_nobody, range(3), strangers, t, 3, *arguments) for t in (good, lacking)]
    try:
        late_s = {3: 1.0}
        ranks = Ranks(_meet_with_few_descriptors, range(4), 4, good, PATIENCE_S, late_s)
        missing_one = Ranks(_meet_with_few_descriptors, range(3), 4, lacking, 2.0)
        start = time.monotonic()
        failures = missing_one.outcomes()
        assert time.monotonic() - start < PATIENCE_S
        assert ranks.outcomes() == all_met(4)
        assert all(crowd.are_running() for crowd in crowds)
    finally:
        for crowd in crowds:
            crowd.kill()
    assert {type(failure) for failure in failures.values()} == {ExchangeError}
    assert all("with rank(s) 3 in 2 s" in str(failure) for failure in failures.values())


def test_a_stranger_gets_nothing():
    token, wrong = new_token(), new_token()
    ranks = Ranks(meet, range(2), 3, token, 1.5)
    messages = [
        token.encode(),
        b"",
        b"\0" * 32,
        proof(wrong, 1, 0),
        proof(token, 0, 1),  # what rank 0 itself says to others
        proof(token, 2, 1),  # what the missing rank says to another
        proof(token, 1, 0)[:-1],
    ]
    for message in messages:
        assert answer_to(connect(token, 0), message) == (b"", 0)
    # The same stranger, with what only rank 2 can know: the test can tell a refusal from silence.
    assert answer_to(connect(token, 0), proof(token, 2, 0)) == (proof(token, 0, 2), 1)
    assert answer_to(connect(token, 0), proof(token, 2, 0)) == (b"", 0)  # once only
    assert all("with rank(s) 2 in" in str(error) for error in ranks.outcomes().values())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_nothing_even_with_the_token():
    token = new_token()
    ranks = Ranks(meet, range(2), 3, token, 1.5)
    stranger = Ranks(_ask_as_nobody, [2], token)
    assert stranger.outcomes() == {2: (b"", 0)}
    assert all("with rank(s) 2 in" in str(error) for error in ranks.outcomes().values())


def _ask_as_nobody(rank, token):
    os.setuid(65534)
    return answer_to(connect(token, 0), proof(token, rank, 0))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_in_a_ranks_place_is_told_nothing():
    token = new_token()
    stranger = Ranks(_listen_as_nobody, [1], token)
    with pytest.raises(ExchangeError, match=r"rank\(s\) 1 in"):
        exchange(0, 0, 2, token, 1.0)
    assert stranger.outcomes() == {1: b""}


def _listen_as_nobody(rank, token):
    os.setuid(65534)
    heard = []
    with squatter(token, rank, lambda connection: heard.append(connection.recv(4096))):
        time.sleep(1.5)
    assert heard
    return b"".join(heard)


@pytest.mark.parametrize("kind", ["garbage", "echo", "hang-up"])
def test_takes_no_descriptor_from_a_stranger_in_a_ranks_place(kind):
    token, before = new_token(), open_descriptors()
    heard = []

    def answer(connection):
        heard.append(connection.recv(4096))
        if len(heard) == 1:  # rank 0 has served rank 1: only what it takes from here is at stake
            assert answer_to(connect(token, 0), proof(token, 1, 0))[1] == 1
        if kind != "hang-up":
            message = heard[-1] if kind == "echo" else b"x" * 32
            socket.send_fds(connection, [message], [0, 1])

    with squatter(token, 1, answer), pytest.raises(ExchangeError, match=r"rank\(s\) 1 in"):
        exchange(0, 0, 2, token, 0.5)
    assert set(heard) == {proof(token, 0, 1)}
    assert len(heard) < 100, "asked again without a pause"
    assert open_descriptors() == before


def test_says_so_when_a_descriptor_is_lost_on_the_way():
    token, before = new_token(), open_descriptors()

    def answer(connection):
        connection.send(proof(token, 1, 0))  # what the receiver sees at its limit of open files

    with squatter(token, 1, answer), pytest.raises(ExchangeError, match="ulimit -n"):
        exchange(0, 0, 2, token, PATIENCE_S)
    assert open_descriptors() == before


def test_refuses_a_rank_that_is_taken():
    token, before = new_token(), open_descriptors()
    with (
        squatter(token, 0, lambda _: None),
        pytest.raises(ExchangeError, match="another process hold this rank"),
    ):
        exchange(0, 0, 2, token, PATIENCE_S)
    assert open_descriptors() == before
