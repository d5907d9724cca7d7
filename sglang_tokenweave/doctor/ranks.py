"""Run a function on several ranks over gloo, and leave no process behind whatever happens."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(RuntimeError):
    """A rank failed, died or missed the deadline; the text says which and how."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, deadline_s: float
) -> list[Any]:
    """Call `function(rank, group, *arguments)` on every rank, a process each.

    Returns:
        What the ranks returned, in rank order.

    Raises:
        RankError: naming the first rank that gave no answer.
    """
    context = torch.multiprocessing.get_context("spawn")
    deadline = time.monotonic() + deadline_s
    processes: list[Any] = []
    receivers: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                what = (sender, function, rank, world_size, store, deadline_s, arguments)
                process = context.Process(target=_rank, args=what, daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                receivers.append(receiver)
            return _collect(receivers, processes, deadline, deadline_s)
        finally:
            for process in processes:
                process.kill()  # whoever has answered has nothing more to do
                process.join(5)


def _collect(
    receivers: list[Connection], processes: list[Any], deadline: float, deadline_s: float
) -> list[Any]:
    answers: dict[int, Any] = {}
    # In order of arrival: the first to fail is the cause, those that wait for it follow.
    while len(answers) < len(receivers):
        pending = [each for rank, each in enumerate(receivers) if rank not in answers]
        ready = wait(pending, max(deadline - time.monotonic(), 0))
        if not ready:
            missing = [rank for rank in range(len(receivers)) if rank not in answers]
            raise RankError(f"rank(s) {missing} gave no answer in {deadline_s:g} s")
        rank = receivers.index(ready[0])  # type: ignore[arg-type] # only these were waited for
        try:
            has_failed, value = receivers[rank].recv()
        except EOFError:
            processes[rank].join(5)
            raise RankError(f"rank {rank} died, exit code {processes[rank].exitcode}") from None
        if has_failed:
            raise RankError(f"rank {rank}: {value}")
        answers[rank] = value
    return [answers[rank] for rank in range(len(receivers))]


def _rank(
    sender: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    deadline_s: float,
    arguments: tuple[Any, ...],
) -> None:
    os.dup2(2, 1)  # a kernel's message must not fall into the doctor's JSON
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Where it hangs, on standard error, before the parent ends it.
    faulthandler.dump_traceback_later(max(deadline_s - 10, deadline_s / 2))
    signal.alarm(int(deadline_s) + 10)  # a last resort that needs no running Python
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=deadline_s),
        )
        sender.send((False, function(rank, dist.group.WORLD, *arguments)))
    except Exception as error:  # noqa: BLE001 - the parent reports whatever it was
        traceback.print_exc(file=sys.stderr)
        sender.send((True, f"{type(error).__name__}: {' '.join(str(error).split())}"))
    sender.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
