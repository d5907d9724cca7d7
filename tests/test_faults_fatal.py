"""Faults that a server cannot survive: clients get errors, the log a cause, and it ends in time."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faults
import pytest
from faults import Fault, Undisturbed
from server import Server
from thorough import rare

pytestmark = pytest.mark.server

LOST = "rank [0-9] of [0-9] does not reach all other ranks"
CRASHED = r"Subprocess \w+ .{,20}crashed with exit code -9"
END_DEADLINE_S = 45  # what is measured is on the page; a loaded machine takes its time


@dataclass(frozen=True)
class Case:
    """A fault, how it strikes, and what the log says of it."""

    fault: str
    where: str
    strike: Callable[[Server], object]
    cause: str | None  # a pattern; None: killed before it could say anything
    tp: int = 2
    flags: tuple[str, ...] = ()
    marks: tuple[pytest.MarkDecorator, ...] = ()


def kill(rank: int) -> Callable[[Server], None]:
    return lambda server: os.kill(server.rank_process(rank), signal.SIGKILL)


def kill_detokenizer(server: Server) -> None:
    os.kill(server.process_titled("detokenizer"), signal.SIGKILL)


def kill_main(server: Server) -> None:
    os.kill(server.process.pid, signal.SIGKILL)


def order(action: str, where: str, *ranks: int) -> Callable[[Server], object]:
    return lambda server: [faults.order(server, action, where, rank) for rank in ranks]


CASES = {
    "killed-rank-1": Case(
        "a rank is killed (SIGKILL)", "rank 1 of 2", kill(1), f"{CRASHED}|{LOST}"
    ),
    "killed-rank-3-of-4": Case(
        "a rank is killed (SIGKILL)", "rank 3 of 4", kill(3), f"{CRASHED}|{LOST}", tp=4
    ),
    "killed-detokenizer": Case(
        "SGLang's detokenizer is killed", "under load", kill_detokenizer, CRASHED, marks=(rare,)
    ),
    "killed-main": Case("the main process is killed", "under load", kill_main, None, marks=(rare,)),
    "stopped-in-op": Case(
        "a rank is stopped for ever", "rank 1 of 2, in the op", order("stop", "op", 1), LOST
    ),
    "stopped-between-batches": Case(
        "a rank is stopped for ever",
        "rank 0 of 2, between batches, `--watchdog-timeout 10`",
        order("stop", "scheduler", 0),
        "Scheduler watchdog timeout",
        flags=("--watchdog-timeout", "10"),
        marks=(rare,),  # SGLang ends it, as without us
    ),
    **{
        f"raises-{where}-{len(ranks)}": Case(
            f"the {where} raises",
            "on rank 1 alone" if len(ranks) == 1 else "on both ranks",
            order("raise", where, *ranks),
            f"injected into the {where} of rank [01]",
            marks=marks,
        )
        for where, ranks, marks in (
            ("planner", (1,), ()),
            ("planner", (0, 1), (rare,)),
            ("split", (1,), (rare,)),
            ("split", (0, 1), ()),
            ("op", (1,), ()),
            ("op", (0, 1), (rare,)),
        )
    },
    "never-1": Case(
        "the op never comes",
        "on rank 1 alone",
        order("sleep 3600", "op", 1),
        LOST,
        marks=(rare,),  # the same wait as stopped-in-op
    ),
    "never-2": Case(
        "the op never comes",
        "on both ranks",
        order("sleep 3600", "op", 0, 1),
        "op of rank [01] did not end within [0-9]+ s",
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=(pytest.mark.fault(case.fault, case.where), *case.marks))
        for name, case in CASES.items()
    ],
)
def test_ends_with_a_clear_error(
    case: Case,
    fault: Fault,
    model: Callable[[str], Path],
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    flags = (*faults.FLAGS, *case.flags)
    pythonpath = [faults.obedient(tmp_path)]
    with (
        Server(model("llama"), case.tp, flags=flags, pythonpath=pythonpath) as server,
        faults.clients(server) as clients,
    ):
        server.note_shared_memory()
        start = time.monotonic()
        case.strike(server)
        assert server.wait_until_ended(END_DEADLINE_S) != 0
        long, short = clients.long(), clients.short()
    fault.leaks = len(server.left)
    faults.assert_honest([*long, *short], undisturbed)
    assert all(outcome.error for outcome in long), long
    fault.seconds = max(outcome.ended for outcome in (*long, *short)) - start
    fault.sees = ", ".join(sorted(faults.errors([*long, *short])))
    if case.cause:
        fault.sees += f"; log: `{faults.said(server, case.cause)}`"
