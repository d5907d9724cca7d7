"""Run the probes side by side, each with a deadline; what goes wrong in one is its answer."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import IO, Any

from sglang_tokenweave.doctor.answers import from_text
from sglang_tokenweave.doctor.facts import Failure

DEADLINE_S = 120  # eight GPUs without persistence mode take half a minute to wake up


def gather(names: Iterable[str], deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    """Return by name the answer of each probe, or a `Failure`."""
    deadline = time.monotonic() + deadline_s
    with ExitStack() as stack:
        running = {}
        for name in names:
            log = stack.enter_context(tempfile.TemporaryFile())
            running[name] = stack.enter_context(_Probe(name, deadline_s, log))
        return {name: probe.answer(deadline) for name, probe in running.items()}


class _Probe:
    """A process in a session of its own; leaving the context ends it with all it started."""

    def __init__(self, name: str, deadline_s: float, log: IO[bytes]) -> None:
        self._deadline_s = deadline_s
        self._log = log
        # The process outlives the deadline only by a moment, even if nobody is left to end it.
        alarm = str(int(deadline_s) + 10)
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.probe", name, alarm],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )

    def __enter__(self) -> "_Probe":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # In the driver, a process may be unkillable; it is not worth hanging for.
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=5)

    def answer(self, deadline: float) -> Any:
        try:
            output, _ = self._process.communicate(timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return Failure("timeout", f"no answer in {self._deadline_s:g} s")
        if self._process.returncode < 0:
            name = signal.Signals(-self._process.returncode).name
            return Failure("crashed", f"ended by {name}{self._last_words()}")
        try:
            return from_text(output)
        except ValueError:  # it ended before its answer was complete
            code = self._process.returncode
            return Failure("crashed", f"ended with exit code {code}{self._last_words()}")

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        spoken = [line.strip() for line in lines if line.strip()]
        return f": {spoken[-1][:200]}" if spoken else ""
