"""One process per rank, watched: a failure or a silence ends all of them, with its name."""

import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PR_SET_PDEATHSIG = 1
_GRACE_S = 10.0  # for a rank that has finished to end
_AFTERMATH_S = 2.0  # for the other ranks to fail, too, after a first one


class RankError(RuntimeError):
    """A rank failed, died or fell silent; the text says which, where and why."""


class Link:
    """A rank's line to the process that watches it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def phase(self, name: str, deadline_s: float | None = None) -> None:
        """Say what is done next; it has the run's deadline to itself, or its own."""
        self._connection.send(("phase", (name, deadline_s)))

    def send(self, message: Any) -> None:
        """Hand a message to the watching process."""
        self._connection.send(("message", message))


@dataclass
class _Watched:
    rank: int
    process: BaseProcess
    connection: Connection
    deadline_s: float
    phase: str = "starting"
    since: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Return how much longer its phase may take."""
        return self.since + self.deadline_s - time.monotonic()


def run_ranks(
    function: Callable[..., None], world_size: int, *arguments: Any, deadline_s: float
) -> Generator[tuple[int, Any]]:
    """Run `function(rank, link, *arguments)` on every rank of a gloo group; yield their messages.

    Who stops early closes what is returned: that ends the ranks.

    The ranks meet through a file and talk over the loopback interface.

    Args:
        function: importable, as its process is a new one.
        deadline_s: the longest that a rank may stay in one phase.

    Raises:
        RankError: a rank raised, died, or outstayed a phase; no process is left then.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks: dict[Connection, _Watched] = {}
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                place = (rank, world_size, str(Path(folder) / "store"), deadline_s)
                process = context.Process(
                    target=_rank, args=(sender, os.getpid(), place, function, arguments)
                )
                process.start()
                sender.close()
                ranks[receiver] = _Watched(rank, process, receiver, deadline_s)
            yield from _watch(dict(ranks), deadline_s)
            for each in ranks.values():
                each.process.join(_GRACE_S)
        finally:
            for each in ranks.values():
                _end(each)


def _watch(ranks: dict[Connection, _Watched], deadline_s: float) -> Iterator[tuple[int, Any]]:
    while ranks:
        next_late = min(ranks.values(), key=lambda each: each.left_s)
        left_s = next_late.left_s
        if left_s <= 0:
            rank, phase, allowed = next_late.rank, next_late.phase, next_late.deadline_s
            raise RankError(f"rank {rank} did not finish {phase!r} within {allowed:g} s")
        for each in _ready(ranks, left_s):
            kind, value = _receive(each)
            if kind == "phase":
                each.phase, own_deadline_s = value
                each.deadline_s = own_deadline_s or deadline_s
                each.since = time.monotonic()
            elif kind == "message":
                yield each.rank, value
            elif kind == "done":
                del ranks[each.connection]
            else:
                told = [(kind, value), *_others(ranks, each)]
                told.sort(key=lambda of_rank: of_rank[0] != "died")  # that is a cause
                raise RankError("\n".join(text for _, text in told))


def _ready(ranks: dict[Connection, _Watched], timeout_s: float) -> list[_Watched]:
    ready = wait(list(ranks), timeout_s)
    return [each for each in ranks.values() if each.connection in ready]


def _receive(each: _Watched) -> tuple[str, Any]:
    try:
        kind, value = each.connection.recv()
    except (EOFError, ConnectionError):
        each.process.join(_GRACE_S)
        code = each.process.exitcode
        return "died", f"rank {each.rank} died in {each.phase!r} with exit code {code}"
    if kind == "failed":
        return kind, f"rank {each.rank} failed in {each.phase!r}:\n{value}"
    return kind, value


def _others(ranks: dict[Connection, _Watched], first: _Watched) -> list[tuple[str, str]]:
    """Hear how other ranks fail: the first to say so may only have lost its peer."""
    del ranks[first.connection]
    told = []
    end = time.monotonic() + _AFTERMATH_S
    while ranks and time.monotonic() < end:
        for each in _ready(ranks, end - time.monotonic()):
            kind, value = _receive(each)
            if kind in ("died", "failed"):
                told.append((kind, value))
            if kind in ("died", "failed", "done"):
                del ranks[each.connection]
    return told


def _end(each: _Watched) -> None:
    if each.process.exitcode != 0 and each.process.pid:
        # Its whole session: compilers that it started, too.
        try:
            os.killpg(each.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it is gone, or has no session of its own yet
            each.process.kill()
    each.process.join()
    each.process.close()
    each.connection.close()


def _rank(
    connection: Connection,
    parent: int,
    place: tuple[int, int, str, float],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could have told us
        os._exit(1)
    rank, world_size, store, deadline_s = place
    link = Link(connection)
    try:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ[name] = "lo"
        torch.set_num_threads(1)
        link.phase("meeting the other ranks")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=deadline_s),
        )
        function(rank, link, *arguments)
        link.phase("finished")
        connection.send(("done", None))
    except BaseException:  # noqa: BLE001 - whatever it was, the watching process reports it
        connection.send(("failed", traceback.format_exc()))
        os._exit(1)  # other ranks may be gone: nothing here may wait for them
    dist.barrier()
    dist.destroy_process_group()
