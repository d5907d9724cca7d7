"""Ranks that would do different things with a batch stop with a message, instead of waiting."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import requests
import workloads
from in_process import World
from server import Server, after_import

from sglang_tokenweave.agreement import DisagreementError, compare

DIVERGENT = """
_plan = Runtime.plan
def plan(self, batch):
    return None if self.transport.rank == 1 else _plan(self, batch)
Runtime.plan = plan
"""


def test_equal_values_pass_and_others_are_named_on_all_ranks() -> None:
    assert World(3).run(lambda group: compare("it", "same", group)) == [None] * 3
    outcomes = World(3).run(lambda group: compare("it", "ab"[group.rank == 2], group))
    for outcome in outcomes:
        assert isinstance(outcome, DisagreementError)
        assert str(outcome) == "it differs between ranks: rank 0: a; rank 1: a; rank 2: b"


@pytest.mark.server
def test_a_divergent_planner_ends_the_server_with_its_name(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    divergent = after_import(tmp_path, "sglang_tokenweave.runtime", DIVERGENT)
    flags = ("--tokenweave-min-tokens", "64")
    with Server(model("llama"), flags=flags, pythonpath=[divergent]) as server:
        # Answered with an error, or not at all: the ranks are gone.
        request = workloads.greedy_request(workloads.token_ids(1, 200), 1)
        with suppress(requests.RequestException):
            assert server.request("/generate", timeout_s=60, **request).status_code != 200
        assert server.wait_until_ended(deadline_s=60) != 0
        log = server.log()
    assert "the plan of a batch differs between ranks: rank 0: Plan(kind=" in log
    assert "; rank 1: stock" in log
