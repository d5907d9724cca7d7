"""The exchange of file descriptors among the processes of a group, late and killed ones too."""

import errno
import os
import re
import signal
import socket
import time

import pytest
from exchanging import PATIENCE_S, Ranks, address, all_met, meet, open_descriptors

from sglang_tokenweave import descriptors
from sglang_tokenweave.descriptors import ExchangeError, broadcast, exchange, new_token


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


@pytest.mark.parametrize("root", [0, 2])
def test_all_ranks_get_the_descriptor_of_one(root):
    ranks = Ranks(_write_through_the_descriptor_of, range(3), root, new_token())
    assert ranks.outcomes() == {r: [0, 1, 2] if r == root else None for r in range(3)}


def _write_through_the_descriptor_of(rank, root, token):
    before = open_descriptors()
    reader, writer = os.pipe() if rank == root else (None, None)
    got = broadcast(writer, root, rank, 3, token, PATIENCE_S)
    os.write(got, bytes([rank]))
    os.close(got)
    if rank != root:
        assert open_descriptors() == before
        return None
    assert got == writer
    text = b""
    while more := os.read(reader, 3):  # until all writers are closed
        text += more
    os.close(reader)
    assert open_descriptors() == before
    return sorted(text)


def test_names_the_owner_and_the_ranks_that_never_come():
    outcomes = Ranks(_broadcast_or_fail, [1], 0, new_token()).outcomes()
    assert "rank 1 of 3 exchanged no descriptors with rank(s) 0 in 0.5 s" in str(outcomes[1])
    outcomes = Ranks(_broadcast_or_fail, [0, 1], 0, new_token()).outcomes()
    assert "with rank(s) 2 in 0.5 s" in str(outcomes[0])
    assert outcomes[1] == "got it"


def _broadcast_or_fail(rank, root, token):
    with open(os.devnull) as own:
        broadcast(own.fileno() if rank == root else None, root, rank, 3, token, 0.5)
    return "got it"


@pytest.mark.parametrize(("descriptor", "rank"), [(None, 0), (0, 1)])
def test_only_the_owner_brings_a_descriptor(descriptor, rank):
    with pytest.raises(ValueError, match="only rank 0 brings one"):
        broadcast(descriptor, 0, rank, 2, new_token(), 1)


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
