"""The processes that the launch scripts start: ended with all their children, signals in order."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from launch.processes import ProcessGroup, Stop, StopSignals


def test_stop_ends_a_child_that_does_not_want_to(tmp_path):
    ready = tmp_path / "ready"
    stubborn = f"trap '' TERM; echo $BASHPID >'{ready}'; while :; do sleep 0.1; done"
    group = ProcessGroup(["bash", "-c", f"({stubborn}) & wait"])
    deadline = time.monotonic() + 10
    while not (ready.exists() and ready.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert int(ready.read_text()) in group.members()
    group.stop(patience_s=1)
    assert group.members() == []
    assert group.exit_code() == -signal.SIGTERM


def test_stop_removes_shared_memory_of_its_own_only(tmp_path):
    ours, other = (Path(f"/dev/shm/sgl_test_{name}_{os.getpid()}") for name in ("ours", "other"))
    script = (
        "import mmap, sys, time\n"
        "with open(sys.argv[1], 'r+b') as file:\n"
        "    held = mmap.mmap(file.fileno(), 0)\n"
        "open(sys.argv[2], 'w').close()\n"
        "time.sleep(60)\n"
    )
    try:
        for file in (ours, other):
            file.write_bytes(b"x")
        ready = tmp_path / "ready"
        group = ProcessGroup([sys.executable, "-c", script, str(ours), str(ready)])
        deadline = time.monotonic() + 10
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        group.stop()
        assert not ours.exists()
        assert other.exists()
    finally:
        for file in (ours, other):
            file.unlink(missing_ok=True)


def receive_while_held(signals: StopSignals, steps: list[str]) -> None:
    with signals.held():
        os.kill(os.getpid(), signal.SIGTERM)
        steps.append("after the signal")


def test_a_signal_waits_until_the_new_process_is_known():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    steps = []
    try:
        signals = StopSignals()
        with pytest.raises(Stop) as stopped:
            receive_while_held(signals, steps)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert steps == ["after the signal"]
    assert stopped.value.signum == signal.SIGTERM
