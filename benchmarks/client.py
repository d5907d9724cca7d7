"""SGLang's benchmark client, imported once: each load is a fork of the process that did.

Its imports take ten seconds and more, which a new process for each load would pay each time.
"""

import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import LoadError
from benchmarks.servers import HOST

MODULE = "sglang.benchmark.serving"
_TAIL = 2000  # characters of what it said
_START_S = 300  # its imports, on a slow disk


def check(folder: Path) -> None:
    """Find out that the client cannot run before minutes go into starting servers.

    Args:
        folder: for what it says.

    Raises:
        RuntimeError: it cannot, with what it says.
    """
    log = folder / "client.log"
    if _run(["--help"], log, _START_S) != 0:
        raise RuntimeError(
            f"SGLang's client does not run here; install what it lacks: {sys.executable} -m "
            f"{MODULE} --help ended with\n{_tail(log)}"
        )


def drive(arguments: Sequence[str], folder: Path, deadline_s: float) -> dict[str, Any]:
    """Run the client with these arguments; return what it found, one record.

    Args:
        folder: for its files.

    Raises:
        LoadError: it failed, or was not done in time.
    """
    path, log = folder / "outcome.jsonl", folder / "client.log"
    output = ["--output-file", str(path), "--output-details"]
    status = _run([*arguments, *output], log, deadline_s)
    if status is None:
        raise LoadError(f"not done in {deadline_s:.0f} s")
    if status != 0 or not path.exists():
        raise LoadError(f"the client failed\n{_tail(log)}")
    record: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
    return record


def _run(arguments: Sequence[str], log: Path, deadline_s: float) -> int | None:
    """Return the client's exit status; None: it was not done in time, and is no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload_client"])
    process = context.Process(target=_become, args=(MODULE, list(arguments), str(log)))
    process.start()
    try:
        process.join(deadline_s)
        return process.exitcode
    finally:
        process.kill()
        process.join()
        process.close()


def _become(module: str, arguments: list[str], log: str) -> None:
    """Be the client, in a process of its own; what it says goes into a file."""
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= {"NO_PROXY": HOST, "no_proxy": HOST}
    sys.argv = [module, *arguments]
    importlib.import_module(module).cli_main()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_TAIL:].strip() if log.exists() else ""
