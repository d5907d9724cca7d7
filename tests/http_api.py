"""Send the same generated requests to the HTTP APIs of a stock and a woven server.

`python tests/http_api.py --examples 20 --output docs/reliability/http.json` reads /openapi.json,
lets schemathesis make valid and invalid requests for each operation, and has it check the answers.
What fails on the woven server and not on stock is a defect of ours. Exit status 0: nothing does.
"""

import argparse
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recording
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from server import LONG_START_S, WEAVE, Server

from sglang_tokenweave.tiny_model import make_tiny_model

REQUEST_DEADLINE_S = 60
GENERATION_S = 5  # of CPU time for an operation: invalid bodies of a large schema take minutes
SEED = 1
FLAGS = ("--tokenweave-strict", *WEAVE)
# By what they do: after one of these, the requests that follow meet another server.
EXCLUDED = {
    "stop, pause, slow down or resize the server": (
        r"pause_generation|continue_generation|memory_occupation|slow_down|pd_role_switch|elastic_ep"
    ),
    "flush or replace caches": r"flush_cache|hicache",
    "load, send or check weights": r"weight|lora_adapter|remote_instance",
    "profile, record or log to files": (
        r"_profile|expert_distribution|set_trace_level|configure_logging|freeze_gc"
    ),
    "set the scheduler's variables": r"set_internal_state",
}


@dataclass(frozen=True, order=True)
class Failure:
    """A check of schemathesis that an answer to an operation did not pass."""

    operation: str
    check: str
    status: int  # 0: there was no answer


@dataclass
class Findings:
    """What was asked, and what failed, by server."""

    requests: Counter[str] = field(default_factory=Counter)  # by operation
    stock: Counter[Failure] = field(default_factory=Counter)
    woven: Counter[Failure] = field(default_factory=Counter)
    other_status: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # nothing to generate
    cut_short: list[str] = field(default_factory=list)  # after GENERATION_S

    @property
    def new(self) -> list[Failure]:
        """Return what failed on the woven server alone."""
        return sorted(self.woven.keys() - self.stock.keys())


class OutOfTimeError(BaseException):
    """Nothing that hypothesis takes for a failure of what it tests."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError after so much CPU time of this process; waiting does not count."""

    def stop(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGVTALRM, stop)
    # Again each second: where Python ignores exceptions, as in a callback of its collector, one is
    # lost.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def serve(folder: Path) -> Iterator[tuple[Server, Server]]:
    """Start a stock and a woven server."""
    model = make_tiny_model("llama", folder / "llama")
    with ExitStack() as stack:
        yield (
            stack.enter_context(Server(model, launcher="stock", start_deadline_s=LONG_START_S)),
            stack.enter_context(Server(model, flags=FLAGS, start_deadline_s=LONG_START_S)),
        )


def explore(stock: Server, woven: Server, num_examples: int, only: str = "") -> Findings:
    """Ask both servers, request by request, `num_examples` valid and as many invalid ones each.

    Of all operations, or of those with a path that matches `only`.
    """
    findings = Findings()
    schema = schemathesis.openapi.from_dict(woven.request("/openapi.json").json())
    for pattern in EXCLUDED.values():
        schema = schema.exclude(path_regex=pattern)
    for found in schema.include(path_regex=only).get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _explore_operation(findings, (stock, woven), operation, mode, num_examples)
    return findings


def _explore_operation(
    findings: Findings,
    servers: tuple[Server, Server],
    operation: Any,
    mode: GenerationMode,
    num_examples: int,
) -> None:
    @seed(SEED)
    @settings(
        max_examples=num_examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask_both(case: Any) -> None:
        _ask_both(findings, servers, operation.label, case)

    try:
        with cpu_limit(GENERATION_S):
            ask_both()
    except Unsatisfiable:  # an operation without parameters cannot be asked wrongly
        findings.skipped.append(f"{operation.label}, {mode.value}")
    except OutOfTimeError:
        findings.cut_short.append(f"{operation.label}, {mode.value}")


def _ask_both(findings: Findings, servers: tuple[Server, Server], label: str, case: Any) -> None:
    findings.requests[label] += 1
    statuses = []
    for server, failures in zip(servers, (findings.stock, findings.woven), strict=True):
        status, checks = _ask(server, case)
        statuses.append(status)
        failures.update(Failure(label, check, status) for check in checks)
        if server.process.poll() is not None:
            raise server.error(f"ended at {case.as_curl_command()}")
    if statuses[0] != statuses[1]:
        findings.other_status.append(f"{label}: {statuses[0]} in stock, {statuses[1]} woven")


def _ask(server: Server, case: Any) -> tuple[int, list[str]]:
    """Send one request; return the status and the names of the checks that failed."""
    with requests.Session() as session:
        session.trust_env = False  # loopback never goes through a proxy
        try:
            response = case.call(base_url=server.url, session=session, timeout=REQUEST_DEADLINE_S)
        except requests.RequestException as error:
            return 0, [type(error).__name__]
    try:
        case.validate_response(response)
    except FailureGroup as group:
        return response.status_code, sorted({type(each).__name__ for each in group.exceptions})
    return response.status_code, []


def write(output: Path, command: str, num_examples: int, findings: Findings) -> None:
    """Write the table, a row for each operation."""
    rows = []
    for label in sorted(findings.requests):
        failed = [
            sum(count for failure, count in each.items() if failure.operation == label)
            for each in (findings.stock, findings.woven)
        ]
        new = sum(failure.operation == label for failure in findings.new)
        rows.append([label, findings.requests[label], *failed, new])
    sums = [sum(row[column] for row in rows) for column in range(1, 5)]
    recording.write(
        output,
        title="The HTTP API under schemathesis, stock and woven",
        command=command,
        columns=("operation", "requests", "failed checks, stock", "woven", "only woven"),
        rows=[["all", *sums], *rows],
        notes=[
            f"{num_examples} valid and {num_examples} invalid requests for each operation of "
            f"/openapi.json, the same to both servers, {REQUEST_DEADLINE_S} s for each. A failure "
            "is an operation, a check of schemathesis, and a status; most come from a schema that "
            "does not describe what SGLang answers.",
            *(f"Left out, because they {why}: `{which}`" for why, which in EXCLUDED.items()),
            *(f"Only woven: {failure}" for failure in findings.new),
            *(f"Other status: {text}" for text in findings.other_status[:20]),
            "SGLang drops sessions that timed out once a second: until then it refuses (400) to "
            "open another one of that name, so two servers may answer differently.",
            f"Nothing to generate for: {'; '.join(findings.skipped) or 'none'}.",
            f"Generating was ended after {GENERATION_S} s of CPU time for: "
            f"{'; '.join(findings.cut_short) or 'none'}.",
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Compare the HTTP APIs of stock and woven.")
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python tests/http_api.py", *words])
    recording.commit()  # that of now, not of the end
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as (stock, woven):
        findings = explore(stock, woven, options.examples)
        assert woven.request("/health_generate").status_code == 200
    write(options.output, command, options.examples, findings)
    print(f"{findings.requests.total()} requests; new failures: {findings.new or 'none'}")
    return 1 if findings.new else 0


if __name__ == "__main__":
    raise SystemExit(main())
