"""However a woven server ends, nothing of it is left; a dead rank ends it, in seconds."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import workloads
from server import WEAVE, Server
from thorough import rare

pytestmark = pytest.mark.server

FLAGS = ("--tokenweave-strict", *WEAVE)
END_DEADLINE_S = 30


@pytest.fixture
def server(model: Callable[[str], Path]) -> Iterator[Server]:
    with Server(model("llama"), flags=FLAGS) as running:
        assert workloads.run(running, "short_batch")
        yield running


@rare  # every server of the tests ends so
def test_interrupt_leaves_nothing(server: Server) -> None:
    server.stop(signal.SIGINT)  # raises if anything is left


def test_terminate_under_load_leaves_nothing(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        streams = _start_streams(server, pool, num_tokens=150)
        server.stop(signal.SIGTERM)
    # SGLang answers what it has accepted before it goes.
    assert [stream.result() for stream in streams] == [150] * 4


@rare  # tests/test_faults_fatal.py, under load
def test_killed_rank_ends_an_idle_server(server: Server) -> None:
    os.kill(server.rank_process(1), signal.SIGKILL)
    assert server.wait_until_ended(END_DEADLINE_S) != 0


@rare  # the same there
def test_killed_rank_ends_a_busy_server(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        streams = _start_streams(server, pool, num_tokens=1200)
        start = time.monotonic()
        os.kill(server.rank_process(0), signal.SIGKILL)
        status = server.wait_until_ended(END_DEADLINE_S)
        failures = [stream.exception(timeout=END_DEADLINE_S) for stream in streams]
    assert status != 0
    assert time.monotonic() - start < END_DEADLINE_S + 5
    assert all(isinstance(failure, requests.RequestException) for failure in failures), failures


def _start_streams(server: Server, pool: ThreadPoolExecutor, num_tokens: int) -> list[Future[int]]:
    """Start four long answers and return once each has begun to arrive."""
    begun = []

    def read(seed: int) -> int:
        request = workloads.greedy_request(workloads.token_ids(seed, 200), num_tokens)
        for index, piece in enumerate(server.stream(**request)):
            if index == 1:
                begun.append(seed)
            info = piece["meta_info"]
        if info["finish_reason"] is None:
            raise requests.ConnectionError("the answer ended before its end")
        return info["completion_tokens"]

    futures = [pool.submit(read, seed) for seed in range(4)]
    end = time.monotonic() + 60
    while len(begun) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(begun) == 4, [future for future in futures if future.done()]
    return futures
