"""Several servers on one machine, and one server again and again: nothing is mixed up or left."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import faults
import pytest
from faults import Fault, Undisturbed
from server import LONG_START_S, Server
from thorough import rare

pytestmark = pytest.mark.server

SHARING = "servers share a machine"
RESTARTS = int(os.environ.get("TOKENWEAVE_TEST_RESTARTS", "2"))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((2, 2), marks=pytest.mark.fault(SHARING, "2 at TP=2")),
        pytest.param(
            (2, 2, 1, 1), marks=[rare, pytest.mark.fault(SHARING, "2 at TP=2, 2 at TP=1")]
        ),
    ],
    ids=["two", "four"],
)
def test_servers_side_by_side(
    sizes: tuple[int, ...],
    fault: Fault,
    model: Callable[[str], Path],
    undisturbed: Undisturbed,
) -> None:
    # One rank has nothing to weave, and a strict server would say so and end.
    flags = {1: faults.FLAGS[1:], 2: faults.FLAGS}
    servers = [
        Server(model("llama"), tp, flags=flags[tp], start_deadline_s=LONG_START_S) for tp in sizes
    ]
    with ExitStack() as stack, ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(stack.enter_context, servers))
        start = time.monotonic()
        for outcomes in pool.map(_ask_all, servers):
            assert not faults.errors(outcomes)
            faults.assert_honest(outcomes, undisturbed)
        fault.seconds = time.monotonic() - start
        for server in servers:
            assert server.tokenweave()["active"] is (server.tp == 2)
        # All at once: one that ends must not take away what another one uses.
        list(pool.map(Server.stop, servers))
    fault.injected = len(sizes)
    fault.leaks = sum(len(server.left) for server in servers)
    fault.sees = "every answer unchanged"


@pytest.mark.timeout(120 * max(RESTARTS, 5))
@pytest.mark.fault("a server starts and stops in a loop", "TP=2, answers in between")
def test_restarts_leave_nothing_that_grows(
    fault: Fault, model: Callable[[str], Path], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    left = []
    for _ in range(RESTARTS):
        server = Server(
            model("llama"),
            flags=faults.FLAGS,
            environment=environment,
            start_deadline_s=LONG_START_S,
        )
        start = time.monotonic()
        with server:
            fault.seconds = max(fault.seconds or 0, time.monotonic() - start)
            answers = [faults.ask(server, faults.SHORT)]
            server.stop(signal.SIGTERM)  # as a container's runtime would
        faults.assert_honest(answers, undisturbed)
        assert not faults.errors(answers)
        left.append(_left(server, home))
    fault.injected = RESTARTS
    fault.sees = (
        "started within the time shown; SGLang itself leaves "
        f"{len(server.left_in_folder)} files in the temporary folder and "
        f"{len(server.left_in_shared_memory)} in `/dev/shm` each time"
    )
    # The first start may leave what is kept on purpose, such as a cache.
    grown = {kind for kind in left[0] if max(each[kind] for each in left) > left[0][kind]}
    fault.leaks = len(grown)
    assert not grown, left


def _ask_all(server: Server) -> list[faults.Outcome]:
    questions = (*faults.LONG, faults.SHORT)
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: faults.ask(server, question), questions))


def _left(server: Server, home: Path) -> dict[str, int]:
    """Count what could add up; `Server.stop` has seen that nothing else of ours is there."""
    return {
        "processes": len(server.processes()),
        "files in its home": sum(path.is_file() for path in home.rglob("*")),
        "descriptors of its starter": len(os.listdir("/proc/self/fd")),
    }
