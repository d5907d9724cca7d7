"""Whole servers under load, stock and woven in turn: python -m benchmarks.serving --help.

SGLang's own client drives both. Two servers do not fit one set of GPUs, so they take turns: each
round starts every server once, in a new order, and stops it again.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import load, machine, table, timing
from benchmarks.load import LoadError, Outcome, Target
from benchmarks.schema import Result, Row
from benchmarks.servers import HOST, Contender, ServerError, running

_CLIENT = "sglang.benchmark.serving"
_SEED = 20250516


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__.partition("\n")[0]
    )
    add = found.add_argument
    add("--model", required=True, help="folder or name, as of --model-path")
    add("--tp", type=int, default=2, help="GPUs of each server (%(default)s)")
    add("--workloads", type=_workloads, default=load.WORKLOADS, help=",".join(load.WORKLOADS))
    add(
        "--rates", type=_rates, default=(math.inf,), help="requests a second, Poisson; inf: at once"
    )
    add("--prompts", type=int, default=256, help="requests of a workload (%(default)s)")
    add("--rounds", type=int, default=3, help="starts of each server (%(default)s)")
    add("--ttft-ms", type=float, default=1000, help="of a good request, at most (%(default)s)")
    add("--tpot-ms", type=float, default=50, help="of a good request, at most (%(default)s)")
    add("--both", default="", metavar="FLAGS", help="flags of every server")
    add("--stock-best", metavar="FLAGS", help="a second stock server, with its best flags")
    add("--ours", default="", metavar="FLAGS", help="flags of the woven server")
    add("--cpu", action="store_true", help="try it on a CPU: the times mean nothing")
    add("--start-deadline", type=float, default=900, metavar="S", help="of a server (%(default)s)")
    add("--load-deadline", type=float, default=1800, metavar="S", help="of a load (%(default)s)")
    machine.add_arguments(found, "serving")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save after each round and print; return 0, 1 if a server or load failed, or 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.serving", *arguments])
    seen: dict[tuple[str, str], list[Outcome]] = {}
    try:
        meta = machine.meta(options.tp, command, options.commit, options.rounds, smoke=options.cpu)
        for number in range(options.rounds):
            _round(options, number, seen)
            result = Result("serving", meta, _rows(seen))
            result.save(options.output)
    except (ServerError, LoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.text(result))
    return 0


def contenders(options: argparse.Namespace) -> list[Contender]:
    """Return the servers that take part."""
    both = shlex.split(options.both)
    found = [Contender("stock", weaves=False, flags=tuple(both))]
    if options.stock_best is not None:
        flags = (*both, *shlex.split(options.stock_best))
        found.append(Contender("stock/best", weaves=False, flags=flags))
    ours = (*both, *shlex.split(options.ours))
    return [*found, Contender("tokenweave", weaves=True, flags=ours)]


def _round(
    options: argparse.Namespace, number: int, seen: dict[tuple[str, str], list[Outcome]]
) -> None:
    """Run all loads on all servers once; another server is the first in the next round."""
    servers = contenders(options)
    first = number % len(servers)
    for contender in servers[first:] + servers[:first]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            print(f"round {number + 1} of {options.rounds}: {contender.variant}", flush=True)
            with running(
                contender,
                options.model,
                options.tp,
                folder / "log",
                options.start_deadline,
                on_cpu=options.cpu,
            ) as port:
                for workload in options.workloads:
                    for rate in options.rates:
                        found = _drive(options, port, workload, rate, number, folder)
                        shape = f"{workload}-{load.rate_name(rate)}"
                        seen.setdefault((shape, contender.variant), []).append(found)


def _drive(
    options: argparse.Namespace, port: int, workload: str, rate: float, number: int, folder: Path
) -> Outcome:
    """Put a server under one load; the same requests at the same times for every server."""
    seed = _SEED + number
    path = folder / "outcome.jsonl"
    path.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", _CLIENT, "--backend", "sglang", "--model", options.model),
        *("--host", HOST, "--port", str(port), "--request-rate", str(rate), "--seed", str(seed)),
        *("--flush-cache", "--warmup-requests", "1", "--disable-tqdm"),
        *("--output-file", str(path), "--output-details"),
        *load.client_arguments(workload, options.prompts, folder, seed),
    ]
    what = f"{workload} at {rate:g} requests a second"
    local = {"NO_PROXY": HOST, "no_proxy": HOST}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=options.load_deadline,
            env={**os.environ, **local},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"{what}: not done in {options.load_deadline:.0f} s") from error
    if done.returncode != 0 or not path.exists():
        raise LoadError(f"{what}: the client failed\n{(done.stdout + done.stderr)[-2000:]}")
    record = json.loads(path.read_text().splitlines()[-1])
    try:
        return load.outcome(record, options.prompts, Target(options.ttft_ms, options.tpot_ms))
    except LoadError as error:
        raise LoadError(f"{what}: {error}") from error


def _rows(seen: dict[tuple[str, str], list[Outcome]]) -> tuple[Row, ...]:
    rows = []
    for (shape, variant), outcomes in sorted(seen.items()):
        each = load.middle(outcomes)
        extra = {
            "ttft_us": each.ttft_us,
            "tpot_us": each.tpot_us,
            "requests_per_s": each.requests_per_s,
            "tokens_per_s": each.tokens_per_s,
            "goodput_requests_per_s": each.goodput_requests_per_s,
        }
        latency = timing.summarize([outcome.latency_us for outcome in outcomes])
        rows.append(
            Row(shape, round(each.input_tokens), variant, latency.time_us, latency.spread_us, extra)
        )
    return tuple(rows)


def _workloads(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in load.WORKLOADS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is unknown; there are {', '.join(load.WORKLOADS)}"
        )
    return names


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers, such as 2,8,inf") from None
    if not all(rate > 0 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: rates are above 0")
    return rates


if __name__ == "__main__":
    sys.exit(main())
