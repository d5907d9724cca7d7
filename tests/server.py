"""Start a real SGLang server in a subprocess, ask it, stop it, and see that nothing is left of it.

A subprocess always: SGLang ends its whole process tree when something in it raises.
"""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import requests

from launch import ports
from sglang_tokenweave import cpu

INSTALLED = importlib.metadata.version("sglang")
VERSIONS = ("0.5.17", "0.5.21", "0.5.23")
LAUNCHERS = {
    "tokenweave": ("-m", "sglang_tokenweave.launch_server"),
    "sglang": ("-m", "sglang.launch_server", "--enable-tokenweave"),
    "serve": (f"{sys.prefix}/bin/sglang", "serve", "--enable-tokenweave"),
    "off": ("-m", "sglang.launch_server"),  # installed, and not switched on
    "stock": ("-m", "sglang.launch_server"),  # as if not installed
}
# Whatever can be cut is woven.
WEAVE = ("--tokenweave-min-tokens", "4", "--tokenweave-decode-min-tokens", "2")
START_DEADLINE_S = 300  # 25-35 s on two idle cores, 65-90 s beside another one that starts
LONG_START_S = 900  # of a long run, which may share its machine with anything
STOP_DEADLINE_S = 40
# SGLang leaves these behind itself; `sem.` are Python's own, unlinked as soon as they are made.
SGLANG_SHARED_MEMORY = ("sgl_shm_mq_", "sglang_loads_", "sem.")


class ServerError(AssertionError):
    """A server did not do what is expected of any server; the message ends with its log."""


@dataclass
class Server:
    """A context manager around one server; `flags` are ours and SGLang's alike, later ones win."""

    model: Path
    tp: int = 2
    flags: Sequence[str] = ()
    launcher: str = "tokenweave"
    sglang: str = INSTALLED
    pythonpath: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    start_deadline_s: float = START_DEADLINE_S

    running: ClassVar[list[Self]] = []

    def __enter__(self) -> Self:
        self.launch()
        try:
            self._wait_until_healthy()
        except BaseException:
            self._kill()
            self._remove_traces()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.stop(check=kind is None)

    def launch(self) -> None:
        """Start the process and return at once."""
        # Short, because SGLang makes its sockets here and a socket's path ends at 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="tw-"))
        self.port = _free_port()
        self.shared_memory: set[str] = set()
        command = [
            *(sys.executable, *LAUNCHERS[self.launcher]),
            *("--model-path", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)),
            # Named, below the kernel's ephemeral ports: SGLang's own choice can be taken meanwhile.
            *("--dist-init-addr", f"127.0.0.1:{self.port + 1}"),
            *cpu.server_arguments(self.tp),
            "--sleep-on-idle",  # an idle scheduler would keep a core busy
            # Ranks that differ are an error in every test.
            *(() if self.launcher == "stock" else ("--tokenweave-check-plans",)),
            *self.flags,
        ]
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        Server.running.append(self)

    def wait_until_ended(self, deadline_s: float) -> int:
        """Return the exit status of a server that ends by itself, and clean up after it."""
        try:
            self.process.wait(deadline_s)
            self._wait_until(lambda: not self.processes(), deadline_s, "end its processes")
            self._check_traces()
        except subprocess.TimeoutExpired:
            raise self.error(f"still runs after {deadline_s} s") from None
        finally:
            self._kill()
            self.text = self.log()
            self._remove_traces()
        return self.process.returncode

    def stop(self, signal_number: int = signal.SIGINT, *, check: bool = True) -> None:
        """Signal the main process; then nothing may be left.

        SGLang ends at once on SIGINT, and only looks for SIGTERM every five seconds.
        """
        if self not in Server.running:
            return
        self.note_shared_memory()
        self.process.send_signal(signal_number)
        try:
            self._wait_until(lambda: not self.processes(), STOP_DEADLINE_S, "stop")
            self.process.wait(STOP_DEADLINE_S)
            self._check_traces()
        except ServerError:
            if check:
                raise
        finally:
            self._kill()
            self.text = self.log()
            self._remove_traces()

    def processes(self) -> list[int]:
        """Return the living processes of the server's session."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
            if int(session) == self.process.pid and state not in "ZX":
                found.append(int(entry.name))
        return found

    def rank_process(self, rank: int) -> int:
        """Return the process that runs a tensor-parallel rank."""
        return self.process_titled(rf"scheduler.*TP{rank}\b")

    def process_titled(self, pattern: str) -> int:
        """Return the process whose title contains a pattern."""
        for pid in self.processes():
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            if re.search(pattern, title):
                return pid
        raise self.error(f"has no process titled {pattern}")

    def note_shared_memory(self) -> None:
        """Remember which files in /dev/shm the server holds open: their names need not tell."""
        for pid in self.processes():
            try:
                maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            names = [line.partition("/dev/shm/")[2] for line in maps]
            self.shared_memory.update(name.removesuffix(" (deleted)") for name in names if name)

    def traces(self) -> list[str]:
        """Name what a stopped server left behind, other than what stock SGLang leaves."""
        left = [f"process {pid}" for pid in self.processes()]
        left += [
            f"/dev/shm/{name}"
            for name in sorted(self.shared_memory)
            if Path("/dev/shm", name).exists() and not name.startswith(SGLANG_SHARED_MEMORY)
        ]
        # SGLang's own sockets and locks there are called tmp*.
        left += [str(path) for path in self.folder.rglob("*tokenweave*")]
        if not ports.is_free(self.port):
            left.append(f"a listener on port {self.port}")
        return left

    def log(self) -> str:
        """Return everything the server wrote."""
        if not self.folder.exists():
            return self.text
        return (self.folder / "log").read_text(errors="replace")

    def log_tail(self, num_lines: int = 60) -> str:
        """Return the end of the log, without the imports that SGLang skips on a CPU."""
        lines = [line for line in self.log().splitlines() if "Ignore import error" not in line]
        return "\n".join(lines[-num_lines:])

    def error(self, problem: str) -> ServerError:
        """Return an error that shows the command and the end of the log."""
        command = " ".join(map(str, self.process.args))
        return ServerError(f"the server {problem}\n{command}\n{self.log_tail()}")

    def request(self, path: str, *, timeout_s: float = 120, **payload: Any) -> requests.Response:
        """POST `payload` if there is one, GET otherwise."""
        with _session() as session:
            method = "POST" if payload else "GET"
            return session.request(method, self.url + path, json=payload or None, timeout=timeout_s)

    def generate(self, **payload: Any) -> Any:
        """Return what /generate answers."""
        response = self.request("/generate", **payload)
        if response.status_code != 200:
            raise self.error(f"answered {response.status_code}: {response.text}")
        return response.json()

    def stream(self, **payload: Any) -> Iterator[dict[str, Any]]:
        """Yield the pieces that /generate streams; closing the generator disconnects."""
        with (
            _session() as session,
            session.post(
                self.url + "/generate", json={**payload, "stream": True}, stream=True, timeout=120
            ) as response,
        ):
            response.raise_for_status()
            for line in response.iter_lines():
                text = line.decode().removeprefix("data: ")
                if text and text != "[DONE]":
                    yield json.loads(text)

    def flush_cache(self) -> None:
        """Empty the radix cache, which needs an idle server."""
        self._wait_until(
            lambda: self.request("/flush_cache", timeout_s=30).status_code == 200, 60, "idle"
        )

    def tokenweave(self) -> dict[str, Any] | None:
        """Return our block of /server_info; None on a stock server."""
        state = self.request("/server_info").json()["internal_states"][0]
        return state.get("tokenweave")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _environment(self) -> dict[str, str]:
        return {
            **environment(self.tp, self.sglang, self.pythonpath),
            "TMPDIR": str(self.folder),
            # Stock means: not even our flags. SGLang loads the named plugins only.
            **({"SGLANG_PLUGINS": "none"} if self.launcher == "stock" else {}),
            **self.environment,
        }

    def _wait_until_healthy(self) -> None:
        def is_healthy() -> bool:
            if self.process.poll() is not None:
                raise self.error(f"ended with status {self.process.returncode} while starting")
            try:
                return self.request("/health_generate", timeout_s=30).status_code == 200
            except requests.RequestException:
                return False

        self._wait_until(is_healthy, self.start_deadline_s, "become healthy")

    def _wait_until(self, condition: Any, deadline_s: float, what: str) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > end:
                raise self.error(f"did not {what} within {deadline_s} s")
            time.sleep(0.1)

    def _check_traces(self) -> None:
        self.left = self.traces()
        if self.left:
            raise self.error(f"left behind: {', '.join(self.left)}")

    def _kill(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)

    def _remove_traces(self) -> None:
        self.left_in_shared_memory = [
            name for name in sorted(self.shared_memory) if Path("/dev/shm", name).exists()
        ]
        self.left_in_folder = [path.name for path in self.folder.rglob("*") if path.name != "log"]
        for name in self.shared_memory:
            Path("/dev/shm", name).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        Server.running.remove(self)


def environment(
    tp: int, version: str = INSTALLED, pythonpath: Sequence[Path] = ()
) -> dict[str, str]:
    """Return the environment of a process that uses SGLang, without what this one was told."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SGLANG_")}
    paths = [*map(str, pythonpath), *overlay(version)]
    if "PYTHONPATH" in inherited:
        paths.append(inherited["PYTHONPATH"])
    return {
        **inherited,
        **cpu.environment(tp),
        "PYTHONPATH": os.pathsep.join(paths),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def overlay(version: str) -> list[str]:
    """Return the folder that, first on PYTHONPATH, selects another release of SGLang."""
    if version == INSTALLED:
        return []
    home = os.environ.get("TOKENWEAVE_OVERLAYS", f"{sys.prefix}/overlays")
    folder = Path(home, version)
    if not (folder / "sglang").is_dir():
        remedy = f"bash launch/setup.sh --overlay {version}"
        raise AssertionError(f"SGLang {version} is not in {folder}; make it: {remedy}")
    return [str(folder)]


def after_import(folder: Path, module: str, code: str) -> Path:
    """Write a folder for `pythonpath` that makes every process run `code` inside a module.

    Python imports `sitecustomize` when it starts, in spawned workers too; this one adds an import
    hook that appends `code` to the execution of `module`.
    """
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(module=module, code=code))
    return folder


_SITECUSTOMIZE = """\
import importlib.machinery
import sys


class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name == {module!r} else None
        if spec:
            execute = spec.loader.exec_module

            def execute_and_patch(module):
                execute(module)
                exec({code!r}, vars(module))

            spec.loader.exec_module = execute_and_patch
        return spec


sys.meta_path.insert(0, Finder)
"""


def _session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # loopback never goes through a proxy
    return session


def _free_port() -> int:
    # A server that is starting has not bound its ports yet, here or in another worker of pytest.
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    others = {base for base in ports.BASES if base // ports.BLOCK % workers != worker}
    base = ports.free_block(others | {server.port for server in Server.running})
    if base is None:
        raise AssertionError(f"no {ports.BLOCK} free ports in a row in {ports.BASES}")
    return base
