"""`python -m sglang_tokenweave.tune --output FILE <server flags>`: measure a table for a fleet.

Starts a server that measures, waits until the table is there and the server answers, stops it, and
puts the table in its place. What goes wrong leaves no server and no half a table.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sglang_tokenweave import user_cache
from sglang_tokenweave.tuning import text

STOP_S = 60.0  # for the server to end by itself after SIGTERM
_POLL_S = 0.2
_OURS = ("--tokenweave-tune", "--tokenweave-table", "--host", "--port", "--enable-tokenweave")
_TAIL = 30  # lines of the log under an error


class TuneError(RuntimeError):
    """No table: the text says why, and ends with the server's log."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of our own options; all others are the server's."""
    found = argparse.ArgumentParser(
        prog="python -m sglang_tokenweave.tune",
        usage="%(prog)s --output FILE [--wait SECONDS] --model-path MODEL --tp N ...",
        description="Measure what is best for each batch size on this machine, into a file.",
        epilog="all other flags are those of the server; exit code: 0, 1 failed, 2 bad arguments",
        allow_abbrev=False,
    )
    found.add_argument("--output", required=True, type=Path, metavar="FILE")
    found.add_argument("--wait", type=float, default=1800, metavar="SECONDS", help="default: 1800")
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit code."""
    options, flags = parser().parse_known_args(arguments)
    for given in flags:
        if given.partition("=")[0] in _OURS:
            parser().error(f"{given} is set by this command; leave it out")
    if not options.output.absolute().parent.is_dir():
        parser().error(f"--output is {options.output}; there is no folder {options.output.parent}")
    try:
        content = measure(flags, options.wait)
        user_cache.write(options.output, content)
    except (TuneError, OSError) as error:
        sys.stderr.write(f"{parser().prog}: error: {error}\n")
        return 1
    sys.stdout.write(f"{options.output}: {len(content)} bytes, a table of this machine\n")
    return 0


def measure(flags: Sequence[str], wait_s: float) -> bytes:
    """Run a server with these flags until it has measured; return the table's text.

    Raises:
        TuneError: it ended, or did not measure in time.
    """
    folder = Path(tempfile.mkdtemp(prefix="tw-tune-"))
    try:
        with _server(flags, folder) as (process, port), open(folder / "log", "rb") as log:
            _wait(process, folder / "table.yaml", port, log, time.monotonic() + wait_s)
        return text.read_file(folder / "table.yaml")[1].encode()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _server(flags: Sequence[str], folder: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    port = _free_port()
    command = [sys.executable, "-m", "sglang_tokenweave.launch_server", *flags]
    command += ["--host", "127.0.0.1", "--port", str(port), "--tokenweave-strict"]
    command += ["--tokenweave-tune", "force", "--tokenweave-table", str(folder / "table.yaml")]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, port
    finally:
        _stop(process)


def _wait(
    process: "subprocess.Popen[bytes]", table: Path, port: int, log: BinaryIO, deadline: float
) -> None:
    """Pass on what the extension says until the table is there and the server answers."""
    said: list[str] = []
    while True:
        has_ended = process.poll() is not None
        for line in log.read().decode(errors="replace").splitlines():
            said.append(line)
            if "TokenWeave" in line:
                sys.stderr.write(line + "\n")
        if has_ended or time.monotonic() > deadline:
            what = f"ended with status {process.returncode}" if has_ended else "took too long"
            tail = "\n".join(said[-_TAIL:])
            raise TuneError(f"the server {what} before it had measured; its log ends with\n{tail}")
        if table.exists() and _answers(port):
            return
        time.sleep(_POLL_S)


def _answers(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=10) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server, and whatever of its session is left."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_S)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing was


def _free_port() -> int:
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        return int(candidate.getsockname()[1])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends, too
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
