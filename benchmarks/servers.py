"""Start and stop the servers that are compared, and ask them what they are."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from launch import demo, ports
from launch.processes import ProcessGroup
from sglang_tokenweave import cpu

HOST = ports.HOST
# For servers that start side by side, where a rank may find less memory than another. By its older
# name, SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK=1, SGLang 0.5.17 switches the check on.
UNBALANCED = ("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
ENDING = Event()  # a signal asked this program to stop: no server is waited for any longer
_STEP_S = 0.5
_LOG_LINES = 30
_CHOOSING, _CHOSEN = Lock(), set[int]()  # first ports: servers that start together bind them late


class ServerError(Exception):
    """A server did not start, or is not what it was to be; the text ends with its log."""


@dataclass(frozen=True)
class Contender:
    """A server that takes part."""

    variant: str  # as in the results
    weaves: bool
    flags: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()  # of the environment

    def command(self, model: str, tp: int, port: int, *, on_cpu: bool) -> list[str]:
        """Return the command line."""
        module = "sglang_tokenweave.launch_server" if self.weaves else "sglang.launch_server"
        machine = cpu.server_arguments(tp) if on_cpu else ["--tp", str(tp)]
        return [
            *(sys.executable, "-m", module, "--model-path", model),
            *("--host", HOST, "--port", str(port)),
            # Named: SGLang's own choice could be taken by somebody else meanwhile.
            *("--dist-init-addr", f"{HOST}:{port + 1}"),
            *machine,
            *self.flags,
        ]

    def environment(self, tp: int, *, on_cpu: bool) -> dict[str, str]:
        """Return the environment: for a stock server, as if the extension were not installed."""
        return {
            **os.environ,
            **(cpu.environment(tp) if on_cpu else {}),
            **({} if self.weaves else {"SGLANG_PLUGINS": "none"}),
            **dict(self.variables),
        }


@contextmanager
def running(
    contender: Contender, model: str, tp: int, log: Path, deadline_s: float, *, on_cpu: bool
) -> Iterator[int]:
    """Serve while the block runs; yields the port. Nothing of the server is left afterwards.

    Raises:
        ServerError: it did not start in time, ended, or was to weave and does not.
    """
    port = _free_port()
    command = contender.command(model, tp, port, on_cpu=on_cpu)
    with log.open("wb") as file:
        server = ProcessGroup(command, contender.environment(tp, on_cpu=on_cpu), file)
        try:
            _wait(server, port, contender, log, deadline_s)
            _check(contender, port, log)
            yield port
        finally:
            server.stop()


def _wait(
    server: ProcessGroup, port: int, contender: Contender, log: Path, deadline_s: float
) -> None:
    end = time.monotonic() + deadline_s
    while not demo.is_healthy(f"http://{HOST}:{port}"):
        if server.exit_code() is not None:
            raise ServerError(f"{contender.variant}: the server ended{_tail(log)}")
        if ENDING.is_set():
            raise ServerError(f"{contender.variant}: stopped while it started")
        if time.monotonic() > end:
            raise ServerError(f"{contender.variant}: no answer in {deadline_s:.0f} s{_tail(log)}")
        time.sleep(_STEP_S)


def _check(contender: Contender, port: int, log: Path) -> None:
    """Refuse a server that is to weave and runs stock: both sides would be the same."""
    if not contender.weaves:
        return
    state = demo.get_json(f"http://{HOST}:{port}/server_info")["internal_states"][0]
    ours = state.get("tokenweave", {})
    if not ours.get("active"):
        raise ServerError(
            f"{contender.variant}: TokenWeave is not active on this server, so that both sides "
            f"would be stock: {'; '.join(ours.get('reasons', ()))}{_tail(log)}"
        )


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    kept = [line for line in lines if "Ignore import error" not in line]  # of SGLang on a CPU
    return "\n".join(["; its log ends with", *kept[-_LOG_LINES:]])


def _free_port() -> int:
    with _CHOOSING:
        base = ports.free_block(_CHOSEN)
        if base is None:
            raise ServerError("no 16 free ports in a row between 20000 and 32000")
        _CHOSEN.add(base)
    return base
