"""The command line of the doctor; docs/doctor.md explains its output and exit codes."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from io import TextIOWrapper
from typing import Any, TextIO

from sglang_tokenweave.doctor import checkup, logs, report, selftest
from sglang_tokenweave.doctor.verdict import decide

CAN, CANNOT, USAGE = 0, 1, 2


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m sglang_tokenweave.doctor",
        description="Tell whether and how this machine can weave, and what is wrong with it.",
        epilog="exit code: 0 it can weave (the self-test passed, the log shows nothing), 1 not, "
        "2 bad arguments",
    )
    found.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    what = found.add_mutually_exclusive_group()
    what.add_argument(
        "--selftest", action="store_true", help="also run the op on these GPUs, over unicast"
    )
    what.add_argument(
        "--selftest-multicast", action="store_true", help="also run it over NVSwitch multicast"
    )
    what.add_argument("--log", metavar="FILE", help="read a server's log instead (-: from a pipe)")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the doctor and return its exit code."""
    options = parser().parse_args(arguments)
    if options.log is not None:
        return _read_log(options.log, options.json)
    if options.selftest_multicast:
        refusal = selftest.refuse_multicast()
        if refusal:
            _write(report.refusal_json(refusal) if options.json else report.lines(refusal.findings))
            return CANNOT
    transport = "multicast" if options.selftest_multicast else "peer"
    return _examine(transport if options.selftest or options.selftest_multicast else None, options)


def _examine(transport: str | None, options: argparse.Namespace) -> int:
    facts = checkup.gather()
    findings = checkup.judge(facts)
    verdict = decide(facts, findings)
    if not options.json:
        _write(report.lines(findings))
    result = selftest.run(transport, facts, findings) if transport else None
    if options.json:
        _write(report.machine_json(facts, findings, verdict, result))
    else:
        _write([*report.lines(result.findings if result else ()), report.verdict_line(verdict)])
    is_good = result.passed if result else verdict.can_weave
    return CAN if is_good else CANNOT


def _read_log(name: str, as_json: bool) -> int:
    try:
        with _open(name) as stream:
            sightings = logs.read(stream)
    except OSError as error:
        sys.stderr.write(f"{parser().prog}: error: --log {name}: {error.strerror}\n")
        return USAGE
    _write(report.log_json(name, sightings) if as_json else report.log_lines(name, sightings))
    return CANNOT if sightings else CAN


def _open(name: str) -> Any:
    if name == "-":
        stdin: TextIO = sys.stdin
        if isinstance(stdin, TextIOWrapper):
            stdin.reconfigure(errors="replace")
        return nullcontext(stdin)
    return open(name, encoding="utf-8", errors="replace")


def _write(what: dict[str, Any] | Iterable[str]) -> None:
    text = json.dumps(what, indent=1) if isinstance(what, dict) else "\n".join(what)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _run() -> int:
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # of `... | head`; Python would flush once more and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return CANNOT


if __name__ == "__main__":  # the self-test's ranks are spawned and import this module again
    # A rank or probe that the driver holds in the kernel must not hold up the end, too.
    os._exit(_run())
