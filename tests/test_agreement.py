"""Voted steps, in threads, and the deadline of a group of torch.distributed, in processes."""

import os
import time

import pytest
import torch.distributed as dist
from exchanging import Ranks
from in_process import World

from sglang_tokenweave.agreement import DisagreementError, LostRankError, TorchGroup, gather, step

WORLD = 2


def _run(action, world_size=3, **options):
    return World(world_size).run(
        lambda group: step("a step", group, lambda: action(group), **options)
    )


def test_a_step_returns_each_rank_its_own_result():
    assert _run(lambda group: group.rank * 2) == [0, 2, 4]


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_failure_is_an_error_on_all_ranks_that_names_rank_and_reason(error):
    def fail(group):
        if group.rank == 1:
            raise error("no luck")

    for outcome in _run(fail):
        assert isinstance(outcome, DisagreementError)
        assert str(outcome) == "a step failed on rank 1: no luck"


def test_a_transient_failure_is_tried_again_only_where_it_failed_and_only_so_often():
    tries = [0, 0, 0]

    def fail_twice(group):
        tries[group.rank] += 1
        if group.rank == 2 and tries[2] < 3:
            raise RuntimeError("busy")
        return tries[group.rank]

    options = {"is_transient": lambda error: str(error) == "busy", "pauses_s": (0, 0)}
    assert _run(fail_twice, **options) == [1, 1, 3]
    tries[:] = [0, 0, -1]
    assert {str(it) for it in _run(fail_twice, **options)} == {"a step failed on rank 2: busy"}


def test_an_error_of_the_program_itself_is_not_taken_for_a_vote():
    def fail(group):
        if group.rank == 0:
            raise TypeError("a bug")

    outcomes = _run(fail)
    assert isinstance(outcomes[0], TypeError)
    assert all(isinstance(outcome, LostRankError) for outcome in outcomes[1:])


def _on_gloo(rank, store, lost, what):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    world = dist.group.WORLD
    assert gather(("from", rank), world) == [("from", 0), ("from", 1)]
    group = TorchGroup(world, deadline_s=0.5)
    assert group.gather(rank) == [0, 1]
    if rank == lost:
        if what == "ends":
            os._exit(0)
        time.sleep(2)
        return None
    with pytest.raises(LostRankError, match=f"rank {rank} of 2 does not reach all other ranks"):
        group.gather(rank)
    return "an error"


@pytest.mark.parametrize("what", ["ends", "is silent"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_is_an_error_within_the_deadline(tmp_path, lost, what):
    ranks = Ranks(_on_gloo, range(WORLD), str(tmp_path / "store"), lost, what, start="fork")
    # They end within seconds or fail the test: gloo's own timeout is half an hour.
    assert ranks.outcomes()[1 - lost] == "an error"
