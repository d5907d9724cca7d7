"""Set up and serve a model with TokenWeave: what launch/serve.sh runs.

Runs under any Python 3.11 or 3.12, with the standard library only: it checks the machine, has
launch/setup.sh make .venv, and starts the server with the Python in there.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import checks, demo
from launch.command import (
    DEMO_MODEL,
    ROOT,
    loopback_url,
    parse_arguments,
    server_command,
    server_environment,
)
from launch.processes import ProcessGroup, Stop, StopSignals

CACHE = ROOT / ".cache"
_TAIL_LINES = 40


class ServerError(Exception):
    """The server did not start, or ended by itself."""


def main(argv: Sequence[str]) -> int:
    """Serve until a signal comes, and return the exit code.

    0: served, then stopped by a signal. 1: the server failed. 2: this machine or the command line
    cannot work. 128 + signal: stopped by a signal before it served.
    """
    options = parse_arguments(argv)
    signals = StopSignals()
    try:
        gpus = checks.num_gpus()
        model, tp_size = _check(options, gpus)
        _run(["bash", str(ROOT / "launch" / "setup.sh")], signals)
        _serve(options, model or str(DEMO_MODEL), tp_size, gpus, signals)
    except checks.CheckError as error:
        print(f"[serve] error: {error}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"[serve] error: {error}", file=sys.stderr)
        return 1
    except Stop as stop:
        say(f"stopped by {stop}")
        return 128 + stop.signum
    say("stopped")
    return 0


def say(text: str) -> None:
    """Print one line of our own, at once."""
    print(f"[serve] {text}", flush=True)


def _check(options: argparse.Namespace, gpus: int) -> tuple[str | None, int]:
    """Return model and number of ranks, or say what is missing before anything long starts."""
    model = checks.check_model(options.model, gpus)
    tp_size = options.tp if options.tp is not None else gpus or 2
    checks.check_tp_size(tp_size, gpus, is_demo=model is None)
    checks.check_port(options.host, options.port)
    checks.check_memory(checks.available_memory_bytes())
    if gpus:
        checks.check_compiler()
    return model, tp_size


def _run(command: Sequence[str], signals: StopSignals) -> None:
    with ExitStack() as stack:
        with signals.held():
            program = ProcessGroup(command)
            stack.callback(program.stop)
        exit_code = program.wait()
    if exit_code:
        raise SystemExit(exit_code)  # the program itself has said why


def _serve(
    options: argparse.Namespace, model: str, tp_size: int, gpus: int, signals: StopSignals
) -> None:
    url = loopback_url(options.host, options.port)
    log = CACHE / "logs" / f"server-{options.port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenweave-"))
        output = stack.enter_context(log.open("wb"))
        command = server_command(options, model, tp_size, gpus)
        environment = server_environment(tp_size, gpus, scratch)
        say(f"starting {model} on {tp_size} ranks, log: {log}")
        with signals.held():
            server = ProcessGroup(command, environment, output)
            stack.callback(server.stop)
        try:
            _wait_until_healthy(server, url, options.wait or (1800 if gpus else 240))
            server.note_shared_memory()
            say(f"ready: {url}")
            _show(url, demo.SHORT if model == str(DEMO_MODEL) else demo.LONG)
            _stay(server)
        except ServerError:
            tail = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            print("[serve] the log ends with:", *tail, sep="\n", file=sys.stderr)
            raise


def _wait_until_healthy(server: ProcessGroup, url: str, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not demo.is_healthy(url):
        if server.exit_code() is not None:
            raise ServerError(f"the server ended with code {server.exit_code()} while it started")
        if time.monotonic() > deadline:
            raise ServerError(f"the server did not answer within {patience_s:.0f} s")
        time.sleep(1)


def _show(url: str, length: int) -> None:
    request = demo.demo_request(seed=1, length=length)
    try:
        start = time.monotonic()
        answer = demo.post_json(f"{url}/generate", request)
        took = time.monotonic() - start
        tokens = answer["meta_info"]["prompt_tokens"]
        say(f"it answered a prompt of {tokens} tokens in {took:.1f} s; prompt's end and answer:")
        print(demo.excerpt(request, answer), flush=True)
        say(demo.describe_weaving(demo.get_json(f"{url}/server_info")))
    except OSError as error:  # it may want a key, or shorter prompts; it serves all the same
        say(f"it did not answer the demo request: {error}")
    body = CACHE / "request.json"
    # Another text than above: SGLang has that one in its cache, so little of it would be left.
    body.write_text(json.dumps(demo.demo_request(seed=2, length=length)))
    say(f"stop it with Ctrl-C or: kill {os.getpid()}")
    say("try it, in another shell:")
    print(demo.curl_line(url, body), flush=True)


def _stay(server: ProcessGroup) -> None:
    try:
        exit_code = server.wait()
    except Stop as stop:
        say(f"{stop}: stopping the server")
        return
    raise ServerError(f"the server ended by itself with code {exit_code}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
