"""The README's command as a newcomer types it: serve, send the printed request, stop."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from thorough import rare

from launch import checks, demo

SERVE = Path(__file__).resolve().parent.parent / "launch" / "serve.sh"

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(checks.num_gpus() > 0, reason="on a GPU the command needs a model"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="the printed line needs curl"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_curl_line(server: subprocess.Popen, output: Path, patience_s: float) -> str:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and server.poll() is None:
        for line in output.read_text().splitlines(keepends=True):
            if line.startswith("curl ") and line.endswith("\n"):
                return line
        time.sleep(0.5)
    raise AssertionError(f"no curl line (exit code {server.poll()}):\n{output.read_text()}")


def woven(port: int) -> int:
    info = demo.get_json(f"http://127.0.0.1:{port}/server_info")
    return info["internal_states"][0]["tokenweave"]["batches"]["prefill"]["weave"]


def is_running(process: psutil.Process) -> bool:
    # A zombie has ended; the machine's init, not we, has to collect it.
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    "signum",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=rare)],
    ids=lambda s: s.name,
)
def test_serve_answer_and_stop(tmp_path, signum):
    port, output = free_port(), tmp_path / "output"
    # A proxy that does not exist: no request to this machine may go through it.
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9"}
    with output.open("w") as sink:
        server = subprocess.Popen(
            ["bash", str(SERVE), "--port", str(port)],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        line = wait_for_curl_line(server, output, patience_s=600)
        before = woven(port)
        assert before > 0, output.read_text()
        answer = subprocess.run(
            ["bash", "-c", line], cwd="/", env=environment, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr
        text = json.loads(answer.stdout)["text"]
        # Python, and no noise: random weights give any byte, most of them not ASCII.
        assert text.isascii(), text
        assert re.search(r"\b(self|return|if|for|raise|def)\b", text), text
        assert woven(port) > before

        family = psutil.Process(server.pid).children(recursive=True)
        assert family
        server.send_signal(signum)
        assert server.wait(timeout=60) == 0, output.read_text()
    finally:
        # Were the test to fail above: serve.py stops its server, whoever stops serve.py.
        server.terminate()
        server.wait(timeout=60)
    assert [process for process in family if is_running(process)] == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
