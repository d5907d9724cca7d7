"""Start a program with everything it starts in turn, and stop all of it."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

_PROC = Path("/proc")
_SHARED_MEMORY = Path("/dev/shm")
# What SGLang and multiprocessing leave there: they kill, so not everyone cleans up.
_LEFTOVERS = ("sgl*", "sem.mp-*")


class Stop(BaseException):
    """Somebody asked this program to stop; like KeyboardInterrupt, and for SIGTERM too."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Raise `Stop` on SIGINT and SIGTERM."""

    def __init__(self) -> None:
        self._held = False
        self._pending: int | None = None
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals back for a moment in which a process would be started and not yet known."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending is not None:
            raise Stop(self._pending)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = signum
        else:
            raise Stop(signum)


class ProcessGroup:
    """A running program in a session of its own, by which its descendants are recognised."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        output: IO[bytes] | None = None,
    ) -> None:
        self._leader = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )
        self._leftovers: set[Path] = set()

    @property
    def pid(self) -> int:
        """The process id of the program itself, which is also its session's."""
        return self._leader.pid

    def exit_code(self) -> int | None:
        """Return the program's exit code, None while it runs."""
        return self._leader.poll()

    def wait(self) -> int:
        """Wait for the program itself and return its exit code."""
        return self._leader.wait()

    def members(self) -> list[int]:
        """Return the ids of all running processes of this session."""
        found = {int(entry.name) for entry in _PROC.glob("[0-9]*") if self._has(entry)}
        # Its first thread may be a zombie while others still run: until it can be reaped, it runs.
        return sorted(found | {self.pid} if self.exit_code() is None else found - {self.pid})

    def note_shared_memory(self) -> None:
        """Remember the shared memory that is in use now, to be removed after the end."""
        mapped = {inode for pid in self.members() for inode in _mapped_shared_memory(pid)}
        for file in (file for name in _LEFTOVERS for file in _SHARED_MEMORY.glob(name)):
            with suppress(FileNotFoundError):
                if file.stat().st_ino in mapped:
                    self._leftovers.add(file)

    def stop(self, patience_s: float = 30) -> None:
        """End every process: ask the program, then what it left behind, then kill."""
        try:
            self.note_shared_memory()
            # The program first and alone: a server ends its workers in order.
            self._ask([self.pid] if self.exit_code() is None else [], patience_s)
            self._ask(self.members(), min(patience_s, 5))
        finally:  # also when asked to stop once more while waiting
            for pid in self.members():
                _send(pid, signal.SIGKILL)
            self._wait_for([self.pid, *self.members()], patience_s=10)
            for file in self._leftovers:
                file.unlink(missing_ok=True)

    def _ask(self, pids: list[int], patience_s: float) -> None:
        for pid in pids:
            _send(pid, signal.SIGTERM)
        self._wait_for(pids, patience_s)

    def _wait_for(self, pids: list[int], patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and set(pids) & set(self.members()):
            time.sleep(0.1)

    def _has(self, entry: Path) -> bool:
        try:
            # After the name, which may hold blanks and parentheses: state, parent, group, session.
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return int(session) == self.pid and state != "Z"


def _mapped_shared_memory(pid: int) -> set[int]:
    """Return the inodes: a semaphore's mapping shows a name that it no longer has."""
    try:
        lines = (_PROC / str(pid) / "maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # ended in between
        return set()
    return {int(line.split()[4]) for line in lines if f" {_SHARED_MEMORY}/" in line}


def _send(pid: int, signum: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # ended in between
        os.kill(pid, signum)
