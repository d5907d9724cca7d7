"""The first process of a container: check, serve, pass signals on, reap, and leave nothing.

It stays: as process 1 the server itself would not hear a SIGTERM before it asks for it, and nobody
would reap what its children leave. The exit code is the server's own, or 128 + signal if a signal
ended it; 2 if the settings or the machine cannot work.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from launch import checks
from launch.command import server_environment
from launch.docker.knobs import KnobError, Settings, read, server_command
from launch.processes import ProcessGroup, Stop, StopSignals

_SHARED_MEMORY = Path("/dev/shm")
_SHARED_MEMORY_BYTES = checks.GB  # Docker gives 64 MB, which NCCL fills with a few ranks


def main(arguments: Sequence[str]) -> int:
    """Serve until the server ends or a signal comes, and return the exit code."""
    try:
        signals = StopSignals()
        settings = read(os.environ, arguments)
        check_home(Path.home())
        gpus = 0 if settings.device == "cpu" else visible_gpus()
        tp_size = choose_tp_size(settings, gpus)
        environment = server_environment(tp_size, gpus, scratch="/tmp")
        say(f"starting {settings.model} on {tp_size} ranks")
        return supervise(server_command(settings, tp_size), environment, settings.stop_s, signals)
    except (KnobError, checks.CheckError) as error:
        print(f"[container] error: {error}", file=sys.stderr)
        return 2
    except Stop as stop:
        return 128 + stop.signum


def say(text: str) -> None:
    """Print one line of our own, at once."""
    print(f"[container] {text}", flush=True)


def check_home(home: Path) -> None:
    """Refuse a volume that this user cannot write: compiled kernels and downloads go there."""
    if not os.access(home, os.W_OK | os.X_OK):
        user = f"{os.getuid()}:{os.getgid()}"
        raise checks.CheckError(
            f"{home} cannot be written by user {user}: use a named volume, or give the folder that "
            f"is mounted there to this user (chown {user}; Kubernetes: fsGroup: {os.getgid()})"
        )


def visible_gpus() -> int:
    """Return how many GPUs the container was given; check what a server on them needs."""
    gpus = checks.num_gpus()
    if not gpus:
        raise checks.CheckError(
            "no GPU is visible in the container (nvidia-smi -L lists none), but DEVICE is cuda: "
            "start it with --gpus all, on a machine with the NVIDIA Container Toolkit"
        )
    checks.check_compiler()
    free = shutil.disk_usage(_SHARED_MEMORY).total
    if gpus > 1 and free < _SHARED_MEMORY_BYTES:
        say(
            f"warning: {_SHARED_MEMORY} has {free / checks.GB:.2f} GB, which NCCL may find too "
            "small: start the container with --shm-size 16g"
        )
    return gpus


def choose_tp_size(settings: Settings, gpus: int) -> int:
    """Return the number of ranks; refuse more than there are GPUs, unless nodes share them."""
    if settings.device == "cpu":
        return settings.tp_size or 2
    tp_size = settings.tp_size or gpus
    spans_nodes = any(each.partition("=")[0] == "--nnodes" for each in settings.flags)
    if tp_size > gpus and not spans_nodes:
        raise checks.CheckError(
            f"TP is {tp_size}, but the container sees {gpus} GPUs: choose 1 to {gpus}"
        )
    return tp_size


def supervise(
    command: Sequence[str], environment: Mapping[str, str], stop_s: float, signals: StopSignals
) -> int:
    """Run `command` to its end, or stop it within `stop_s` seconds when a signal comes.

    A second signal ends everything at once.
    """
    with ExitStack() as stack:
        with signals.held():
            server = ProcessGroup(command, environment)
            stack.callback(stop_all, server, stop_s)
        try:
            while server.exit_code() is None:
                reap_orphans(server.pid)
                time.sleep(0.2)
        except Stop as stop:
            say(f"{stop}: the server has {stop_s:g} s to answer what it has accepted")
    exit_code = server.exit_code()
    if exit_code is None:
        say("the server does not end even when it is killed: a driver may hang")
        return 128 + signal.SIGKILL
    say(f"the server ended with code {exit_code}")
    return exit_code if exit_code >= 0 else 128 - exit_code


def stop_all(server: ProcessGroup, stop_s: float) -> None:
    """End every process of the server."""
    try:
        server.stop(stop_s)
    except Stop as stop:  # by now everything is killed
        say(f"{stop} once more: killed at once")


def reap_orphans(leader: int) -> None:
    """Reap what was handed to this process, except the leader: its code is still to be read."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    with suppress(ChildProcessError):
        while (child := os.waitid(os.P_ALL, 0, options)) and child.si_pid != leader:
            os.waitpid(child.si_pid, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
