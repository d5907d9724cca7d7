"""The container's first process, against stand-ins for the server: signals, exit codes, health."""

import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch import checks

ROOT = Path(__file__).resolve().parents[1]
ENTRYPOINT = ROOT / "launch" / "docker" / "entrypoint.py"
HEALTH = ROOT / "launch" / "docker" / "health.py"
DEADLINE_S = 30

Container = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    """Return a function that starts the entrypoint with a program in the place of SGLang."""
    package = tmp_path / "packages" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    started = []

    def start(program: str = "", *, prefix: tuple[str, ...] = (), **environment: str):
        (package / "launch_server.py").write_text(textwrap.dedent(program))
        process = subprocess.Popen(
            [*prefix, sys.executable, ENTRYPOINT],
            env={
                **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                "PYTHONPATH": str(package.parent),
                "HOME": str(tmp_path),
                "MODEL": "m",
                # Stock, because the stand-in stands in for SGLang.
                "DEVICE": "cpu",
                "TOKENWEAVE_ENABLED": "0",
                **environment,
            },
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if file.exists() and file.read_text().endswith("\n"):
            return file.read_text().strip()
        time.sleep(0.02)
    raise AssertionError(f"{file} was not written")


def test_the_servers_exit_code_is_the_containers(container):
    process = container("raise SystemExit(37)")
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, "ended with code 37" in output) == (37, True), output


def test_a_server_that_was_killed_gives_128_and_the_signal(container):
    process = container("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_server_finish(container, tmp_path, signum):
    process = container("""
        import signal, sys, time
        def finish(*_):
            time.sleep(0.5)
            open("finished", "w").write("yes\\n")
            sys.exit(0)
        signal.signal(signal.SIGTERM, finish)
        open("ready", "w").write("yes\\n")
        time.sleep(60)
    """)
    wait_for(tmp_path / "ready")
    process.send_signal(signum)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert wait_for(tmp_path / "finished") == "yes"
    assert f"{signum.name}: the server has 60 s" in output


def test_a_server_whose_first_thread_ends_first_keeps_its_exit_code(container, tmp_path):
    process = container(
        """
        import ctypes, os, signal, threading, time
        def finish():
            open("ready", "w").write("yes\\n")
            stopping.wait()
            time.sleep(1)
            os._exit(4)
        stopping = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopping.set())
        threading.Thread(target=finish).start()
        stopping.wait()
        ctypes.CDLL(None).syscall(EXIT, 0)  # this thread alone
    """.replace("EXIT", {"x86_64": "60", "aarch64": "93"}[os.uname().machine])
    )
    wait_for(tmp_path / "ready")
    process.terminate()
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 4, output


STUBBORN = """
    import os, signal, time
    if os.fork() == 0:
        open("child", "w").write(f"{os.getpid()}\\n")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(f"ready-{os.getpid()}", "w").close()
    while True:
        time.sleep(1)
"""


def wait_until_stubborn(folder: Path) -> int:
    deadline = time.monotonic() + DEADLINE_S
    while len(list(folder.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(wait_for(folder / "child"))


def test_a_server_that_does_not_stop_is_killed_with_its_children(container, tmp_path):
    process = container(STUBBORN, STOP_SECONDS="1")
    child = wait_until_stubborn(tmp_path)
    process.terminate()
    assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_second_signal_kills_at_once(container, tmp_path):
    process = container(STUBBORN, STOP_SECONDS="600")
    child = wait_until_stubborn(tmp_path)
    process.terminate()
    time.sleep(1)
    process.terminate()
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGKILL, output
    assert "killed at once" in output
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(os.getuid() != 0, reason="a namespace of processes needs root")
def test_as_process_1_it_reaps_orphans_and_hears_signals(container, tmp_path):
    process = container(
        """
        import os, signal, sys, time
        assert os.getppid() == 1
        if os.fork() == 0:
            orphan = os.fork()
            if orphan:
                open("orphan", "w").write(f"{orphan}\\n")
                os._exit(0)
            os._exit(0)
        os.wait()
        orphan = int(open("orphan").read())
        end = time.monotonic() + 10
        while os.path.exists(f"/proc/{orphan}"):
            assert time.monotonic() < end, "the orphan is still a zombie"
            time.sleep(0.05)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        open("ready", "w").write("yes\\n")
        time.sleep(60)
        """,
        prefix=("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"),
    )
    wait_for(tmp_path / "ready")
    (first,) = psutil.Process(process.pid).children()
    first.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 5, output


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TOKENWEAVE_MIN_TOKEN": "64"}, "did you mean TOKENWEAVE_MIN_TOKENS?"),
        ({"MODEL": ""}, "MODEL is not set"),
        ({"HOME": "/nonexistent"}, "/nonexistent cannot be written by user"),
        pytest.param(
            {"DEVICE": "cuda"},
            "start it with --gpus all",
            marks=pytest.mark.skipif(checks.num_gpus() > 0, reason="this machine has GPUs"),
        ),
    ],
)
def test_what_cannot_work_ends_with_2_before_a_server_starts(
    container, tmp_path, environment, words
):
    process = container('open("started", "w")', **environment)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, words in output) == (2, True), output
    assert not (tmp_path / "started").exists()


@pytest.fixture
def http_port() -> Iterator[Callable[[int], int]]:
    """Return a function that starts a server which answers with a status, and gives its port."""
    servers = []

    def serve(status: int) -> int:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server.server_port

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def health(port: int) -> int:
    environment = {**os.environ, "MODEL": "m", "PORT": str(port)}
    return subprocess.run([sys.executable, HEALTH], env=environment, timeout=60).returncode


def test_health_is_what_the_server_answers(http_port):
    assert [health(http_port(200)), health(http_port(503))] == [0, 1]


def test_without_a_server_it_is_not_healthy(http_port):
    port = http_port(200)
    assert health(port) == 0
    assert health(1) == 1  # nobody listens there
