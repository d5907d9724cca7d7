"""Lets a server under test go wrong on order; `server.after_import` runs it in its processes.

An order is a file in the server's temporary folder, read once by the rank it names (faults.py
writes it). Nothing here is known to the package.
"""

import os
import signal
import time
from pathlib import Path

from sglang_tokenweave import install, reference, report, runtime


class InjectedError(Exception):
    """What an order to raise raises: nothing in the package knows it."""


def obey(where):
    """Do what this rank was told to do at a place of the forward pass, if anything."""
    rank = install.state.rank
    order = Path(os.environ["TMPDIR"], f"order-{where}-{rank}")
    try:
        action, _, seconds = order.read_text().partition(" ")
        order.unlink()
    except FileNotFoundError:
        return
    if action == "raise":
        raise InjectedError(f"injected into the {where} of rank {rank}")
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if action == "sleep":
        time.sleep(float(seconds))


def obeying(where, function):
    """Return `function` with a look at the orders before each call."""

    def obey_and_call(*arguments, **options):
        obey(where)
        return function(*arguments, **options)

    return obey_and_call


runtime.Runtime.plan = obeying("planner", runtime.Runtime.plan)
runtime.cut_batch = obeying("split", runtime.cut_batch)
# After all ranks have agreed on a plan that is not stock's, and before the op.
runtime.Runtime._run = obeying("run", runtime.Runtime._run)
# Inside the op: on the transport's own thread, beside the computation.
reference.ReferenceTransport._run = obeying("op", reference.ReferenceTransport._run)
# Between two batches, where ranks wait for each other in SGLang's collectives and not in ours.
report.after_run_batch = obeying("scheduler", report.after_run_batch)
