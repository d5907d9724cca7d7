"""The exchange of file descriptors: by processes, late and killed ones too, and among strangers."""

import errno
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import time
from contextlib import contextmanager, suppress
from threading import Thread

import pytest

from sglang_tokenweave import descriptors
from sglang_tokenweave.descriptors import ExchangeError, _Exchange, exchange, new_token

PATIENCE_S = 20  # for what must succeed: two busy cores are slow, and it costs nothing when not


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


class Ranks:
    """Processes that run `function(rank, *arguments)`; what came of each is in `outcomes`."""

    def __init__(self, function, ranks, *arguments, start="fork"):
        context = multiprocessing.get_context(start)
        self._running = {}
        for rank in ranks:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_report, args=(sender, function, rank, arguments))
            process.start()
            sender.close()
            self._running[rank] = process, receiver

    def outcomes(self):
        """Return by rank the value, the exception, or None of a process that was killed."""
        found = {}
        for rank, (process, receiver) in self._running.items():
            assert receiver.poll(2 * PATIENCE_S), f"rank {rank} does not end"
            try:
                found[rank] = receiver.recv()
            except EOFError:
                found[rank] = None
            receiver.close()
            process.join()
            process.close()
        return found

    def kill(self):
        for process, receiver in self._running.values():
            process.kill()
            process.join()
            receiver.close()


def _report(sender, function, rank, arguments):
    try:
        sender.send(function(rank, *arguments))
    except Exception as error:  # noqa: BLE001 - the parent looks at whatever it was
        sender.send(error)


def meet(rank, world_size, token, deadline_s=PATIENCE_S, late_s=None):
    """Write to every rank through the descriptor got from it; return what came through our own."""
    time.sleep((late_s or {}).get(rank, 0))
    before = open_descriptors()
    reader, writer = os.pipe()
    try:
        got = exchange(writer, rank, world_size, token, deadline_s)
        assert got[rank] == writer
        received = [fd for fd in got if fd != writer]
        assert not any(map(os.get_inheritable, received))
        for peer, descriptor in enumerate(got):
            os.write(descriptor, f"{rank:02}to{peer:02} ".encode())
        text = b""
        while len(text) < 7 * world_size:
            text += os.read(reader, 7 * world_size - len(text))
        for descriptor in received:
            os.close(descriptor)
        return sorted(text.decode().split())
    finally:
        os.close(reader)
        os.close(writer)
        assert open_descriptors() == before


def all_met(world_size):
    return {
        rank: [f"{peer:02}to{rank:02}" for peer in range(world_size)] for rank in range(world_size)
    }


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


def address(token, rank):
    return _Exchange(-1, rank, rank + 1, token)._address(rank)


def proof(token, sender, receiver):
    return _Exchange(-1, 0, 1, token)._proof(sender, receiver)


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


@pytest.mark.parametrize(
    ("world_size", "start"), [(1, "fork"), (2, "fork"), (4, "fork"), (8, "fork"), (2, "spawn")]
)
def test_every_rank_gets_the_descriptor_of_every_other(world_size, start):
    ranks = Ranks(meet, range(world_size), world_size, new_token(), start=start)
    assert ranks.outcomes() == all_met(world_size)


@pytest.mark.parametrize("late", [[0], [3], [1, 2, 3]])
def test_waits_for_late_ranks(late):
    late_s = {rank: 1 + index / 10 for index, rank in enumerate(late)}
    ranks = Ranks(meet, range(4), 4, new_token(), PATIENCE_S, late_s)
    assert ranks.outcomes() == all_met(4)


def test_two_groups_at_once_do_not_mix():
    groups = [Ranks(meet, range(4), 4, new_token()) for _ in range(2)]
    assert [group.outcomes() for group in groups] == [all_met(4)] * 2


@pytest.mark.parametrize("absent", [[0], [2], [1, 3]])
def test_names_the_ranks_that_never_come(absent):
    present = [rank for rank in range(4) if rank not in absent]
    start = time.monotonic()
    outcomes = Ranks(meet, present, 4, new_token(), 1.0).outcomes()
    assert time.monotonic() - start < 5
    named = f"with rank(s) {', '.join(map(str, absent))} in 1 s: "
    for rank in present:
        assert isinstance(outcomes[rank], ExchangeError)
        assert f"rank {rank} of 4" in str(outcomes[rank])
        assert named in str(outcomes[rank])
        assert "one network namespace" in str(outcomes[rank])


def test_names_a_rank_killed_in_the_middle():
    outcomes = Ranks(_meet_and_die, range(4), 4, new_token(), 1.5).outcomes()
    assert outcomes.pop(1) is None
    for outcome in outcomes.values():
        assert isinstance(outcome, ExchangeError)
        assert "with rank(s) 1 in" in str(outcome)


def _meet_and_die(rank, *arguments):
    if rank == 1:

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        # It has proven itself to some and knows some, and dies where it would first answer.
        descriptors.socket.send_fds = die
    return meet(rank, *arguments)


@pytest.mark.parametrize("failing", [False, True])
def test_200_exchanges_leave_no_descriptor_open(failing):
    world_size, token = 3, new_token()
    present = range(world_size - failing)
    outcomes = Ranks(_many, present, world_size, token, 0.02 if failing else PATIENCE_S).outcomes()
    assert outcomes == dict.fromkeys(present, (200 * failing, 0))


def _many(rank, world_size, token, deadline_s):
    """Return the number of exchanges that failed and of the descriptors that they left open."""
    before, failed = open_descriptors(), 0
    for index in range(200):
        try:
            got = exchange(0, rank, world_size, f"{token}{index}", deadline_s)
        except ExchangeError:
            failed += 1
        else:
            for descriptor in got:
                if descriptor:
                    os.close(descriptor)
    return failed, open_descriptors() - before


def test_received_descriptors_are_closed_when_another_rank_is_missing():
    outcomes = Ranks(_receive_in_vain, range(2), new_token()).outcomes()
    assert outcomes == {0: (["2"], 0), 1: (["2"], 0)}


def _receive_in_vain(rank, token):
    """Return the ranks that were missing, and the number of descriptors left open."""
    before = open_descriptors()
    with pytest.raises(ExchangeError) as failure:
        exchange(0, rank, 3, token, 1.0)
    named = re.search(r"with rank\(s\) (.*) in 1 s", str(failure.value))
    return named[1].split(", "), open_descriptors() - before


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


def test_asks_again_while_too_many_descriptors_are_in_flight():
    assert Ranks(_meet_after_a_jam, range(2), 2, new_token()).outcomes() == all_met(2)


def _meet_after_a_jam(rank, *arguments):
    send, jams = socket.send_fds, [0, 1, 2]

    def jammed(*message):
        if jams:
            jams.pop()
            raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")
        return send(*message)

    descriptors.socket.send_fds = jammed
    return meet(rank, *arguments)


def test_refuses_a_rank_that_is_taken():
    token, before = new_token(), open_descriptors()
    with (
        squatter(token, 0, lambda _: None),
        pytest.raises(ExchangeError, match="another process hold this rank"),
    ):
        exchange(0, 0, 2, token, PATIENCE_S)
    assert open_descriptors() == before


def test_addresses_are_short_and_do_not_tell_the_token():
    token = new_token()
    assert new_token() != token
    assert len({address(token, rank) for rank in range(1000)}) == 1000
    for rank in (0, 7, 10**6):
        assert address(token, rank).startswith(b"\0")
        assert len(address(token, rank)) < 108
        assert token.encode() not in address(token, rank)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"world_size": 0}, "world_size is 0; it must be at least 1"),
        ({"rank": 2}, "rank is 2; it must be from 0 to 1"),
        ({"rank": -1}, "rank is -1; it must be from 0 to 1"),
        ({"token": "secret"}, r"token has 6 characters; it must be from new_token\(\)"),
        ({"deadline_s": 0.0}, r"deadline_s is 0.0; it must be positive and finite"),
        ({"deadline_s": float("inf")}, "deadline_s is inf; it must be positive and finite"),
        ({"deadline_s": float("nan")}, "deadline_s is nan; it must be positive and finite"),
        ({"descriptor": -1}, "descriptor is -1; it must be open"),
        ({"descriptor": 10**6}, "descriptor is 1000000; it must be open"),
    ],
)
def test_refuses_bad_arguments(changed, message):
    good = {"descriptor": 0, "rank": 0, "world_size": 2, "token": new_token(), "deadline_s": 1.0}
    with pytest.raises(ValueError, match=message):
        exchange(**{**good, **changed})
