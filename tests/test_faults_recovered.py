"""Faults that pass: every request is answered as if nothing had happened, only later."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from faults import Fault, Undisturbed
from server import Server

pytestmark = pytest.mark.server

PAUSE_S = 4
HEALTH_TIMEOUT_S = 3


@pytest.fixture(scope="module")
def server(
    model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with Server(
        model("llama"),
        flags=faults.FLAGS,
        pythonpath=[faults.obedient(tmp_path_factory.mktemp("orders"))],
        environment={"SGLANG_HEALTH_CHECK_TIMEOUT": str(HEALTH_TIMEOUT_S)},
    ) as running:
        with faults.clients(running) as clients:  # what is opened at the first use, is open
            assert not faults.errors([*clients.long(), *clients.short()])
        yield running


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(title, marks=pytest.mark.fault(f"{who} is stopped, then continued", where))
        for title, who, where in (
            ("scheduler.*TP0", "a rank", "rank 0 of 2"),
            ("scheduler.*TP1", "a rank", "rank 1 of 2"),
            ("detokenizer", "SGLang's detokenizer", "under load"),
        )
    ],
)
def test_a_stopped_process_goes_on(
    server: Server, title: str, fault: Fault, undisturbed: Undisturbed
) -> None:
    pid = server.process_titled(title)
    before = faults.descriptors(server)
    with faults.clients(server) as clients:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        os.kill(pid, signal.SIGCONT)
        _assert_recovers(server, clients, fault, undisturbed)
    fault.leaks = _leaks(server, before)


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        pytest.param(
            where, rank, marks=pytest.mark.fault(f"the {where} is late", f"on rank {rank}")
        )
        for where, rank in (("planner", 1), ("split", 0), ("op", 0), ("op", 1))
    ],
)
def test_a_late_rank_is_waited_for(
    server: Server, where: str, rank: int, fault: Fault, undisturbed: Undisturbed
) -> None:
    before = faults.descriptors(server)
    with faults.clients(server) as clients:
        order = faults.order(server, f"sleep {PAUSE_S}", where, rank)
        time.sleep(PAUSE_S)
        assert not order.exists(), "nobody was late"
        _assert_recovers(server, clients, fault, undisturbed)
    fault.leaks = _leaks(server, before)


@pytest.mark.fault("an idle server's rank is stopped", "rank 0 of 2")
def test_a_probe_sees_that_an_idle_server_stands(
    server: Server, fault: Fault, undisturbed: Undisturbed
) -> None:
    pid = server.rank_process(0)
    before = faults.descriptors(server)
    outcomes: list[faults.Outcome] = []
    client = threading.Thread(
        target=lambda: outcomes.append(faults.ask(server, faults.SHORT)), daemon=True
    )
    os.kill(pid, signal.SIGSTOP)
    try:
        client.start()
        start = time.monotonic()
        assert server.request("/health_generate").status_code == 503
        fault.seconds = time.monotonic() - start
        assert not outcomes
    finally:
        os.kill(pid, signal.SIGCONT)
    client.join(60)
    faults.assert_honest(outcomes, undisturbed)
    assert [outcome.error for outcome in outcomes] == [None]
    assert server.request("/health_generate").status_code == 200
    fault.sees = (
        f"`/health_generate` answers 503 (after {HEALTH_TIMEOUT_S} s here, 20 s by default); "
        "what was asked meanwhile is answered once it goes on"
    )
    fault.leaks = _leaks(server, before)


def _assert_recovers(
    server: Server, clients: faults.Clients, fault: Fault, undisturbed: Undisturbed
) -> None:
    start = time.monotonic()
    next_one = faults.ask(server, faults.SHORT)
    fault.seconds = next_one.ended - start
    outcomes = [next_one, *clients.long(), *clients.short()]
    faults.assert_honest(outcomes, undisturbed)
    assert not faults.errors(outcomes)
    fault.sees = "every answer, late and unchanged"


def _leaks(server: Server, before: dict[int, int]) -> int:
    """Return how many descriptors and processes are more than before, once connections closed."""
    end = time.monotonic() + 20
    while True:
        now = faults.descriptors(server)
        more = sum(max(0, num - before.get(pid, 0)) for pid, num in now.items())
        if not more or time.monotonic() > end:
            break
        time.sleep(0.2)
    assert not more, (before, now)
    return more
