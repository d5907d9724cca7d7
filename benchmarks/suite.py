"""Run the benchmarks one after another, then their tables and plots: python -m benchmarks.suite.

Each is the command that its own module documents, with a log and a file of results. One that fails
or does not end in time is named at the end, and the others go on.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import machine, report
from benchmarks.timed_servers import RAISED, names_of
from launch.processes import ProcessGroup, Stop, StopSignals

_POLL_S = 0.5
_SWEEP = ("--tokens", "512,1024,2048,4096,8192")
_DENSE = ("llama-3-8b", "llama-3.3-70b", "qwen2.5-72b", "qwen3-8b")
_LONG = ("--workloads", "in2048-out128")
_CHOSEN = ("--variants", "auto,stock/default,stock/raised,no_comm")


@dataclass(frozen=True)
class Job:
    """One benchmark."""

    name: str  # of its log and its results
    module: str
    arguments: tuple[str, ...]
    minutes: float  # it is stopped then; SGLang and flashinfer may have to compile first
    is_of_servers: bool = True  # of as many GPUs as --tp says

    def command(self, folder: Path, tp: int, commit: str | None) -> list[str]:
        """Return the command line, which writes its results into `folder`."""
        return [
            *(sys.executable, "-m", self.module, *self.arguments),
            *(("--tp", str(tp)) if self.is_of_servers else ("--world-size", str(tp))),
            *(("--commit", commit) if commit else ()),
            *("--output", str(folder / f"{self.name}.json")),
        ]


def _prefill(shape: str, *more: str, minutes: float = 10) -> Job:
    arguments = ("--shape", shape, *_SWEEP, *_CHOSEN, *more)
    return Job(f"prefill-{shape}", "benchmarks.prefill", arguments, minutes)


def _serving(shape: str, *more: str, name: str = "", minutes: float) -> Job:
    what = f"serving-{name}-{shape}" if name else f"serving-{shape}"
    arguments = ("--shape", shape, "--layers", "32", "--stock-best", "=".join(RAISED), *more)
    return Job(what, "benchmarks.serving", arguments, minutes)


JOBS = (
    Job("op", "benchmarks.op", ("--hidden", "8192"), 20, is_of_servers=False),
    _prefill("tp8rank", "--layers", "32", "--deadline", "500", minutes=15),
    *map(_prefill, (*_DENSE, "mixtral-8x22b", "qwen3-30b-a3b")),
    Job("decode-tp8rank", "benchmarks.decode", ("--shape", "tp8rank", *_CHOSEN), 10),
    _serving("tp8rank", minutes=90),
    _serving("llama-3-8b", "--workloads", "in1024-out128", minutes=60),
    _serving("tp8rank", *_LONG, "--rates", "4,8,12,16", name="rates", minutes=60),
    _serving("tp8rank", *_LONG, "--chunk-sizes", "1024,2048,4096,8192", name="chunks", minutes=150),
)
SMOKE = Job(
    "prefill-smoke",
    "benchmarks.prefill",
    ("--cpu", "--shape", "smoke", "--tokens", "600", "--variants", "stock/default"),
    10,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0; 1 if a benchmark failed; 2 if the command is wrong; 128 + signal if stopped."""
    options = _parser().parse_args(arguments)
    chosen = (SMOKE,) if options.cpu else tuple(job for job in JOBS if job.name in options.jobs)
    StopSignals()
    try:
        failed = run(chosen, options.output, options.tp, options.commit)
    except Stop as stop:
        print(f"error: stopped by {stop}; {options.output} has what was measured", file=sys.stderr)
        return 128 + stop.signum
    found = [path for job in chosen if (path := options.output / f"{job.name}.json").exists()]
    can_draw = find_spec("matplotlib") is not None
    if found:
        drawn = ("--plots", str(options.output / "plots")) if can_draw else ()
        report.main([*map(str, found), *drawn])
    if not can_draw:
        print('no plots: they need matplotlib (pip install ".[bench]")', file=sys.stderr)
    for name, why in failed.items():
        print(f"error: {name} {why}; see {options.output / name}.log", file=sys.stderr)
    return 1 if failed else 0


def run(
    jobs: Iterable[Job],
    folder: Path,
    tp: int,
    commit: str | None,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> dict[str, str]:
    """Run jobs one after another; return what became of those that failed, by name.

    Raises:
        Stop: a signal asked to stop; nothing runs any longer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = {}
    for job in jobs:
        command = job.command(folder, tp, commit)
        say(f"{job.name}: at most {job.minutes:g} minutes: {shlex.join(command)}")
        began = time.monotonic()
        problem = _run(command, folder / f"{job.name}.log", job.minutes * 60)
        say(f"{job.name}: {problem or 'done'} after {time.monotonic() - began:.0f} s")
        if problem:
            failed[job.name] = problem
    return failed


def _run(command: Sequence[str], log: Path, deadline_s: float) -> str | None:
    with log.open("wb") as output:
        running = ProcessGroup(command, os.environ, output)
        try:
            end = time.monotonic() + deadline_s
            while (code := running.exit_code()) is None and time.monotonic() < end:
                time.sleep(_POLL_S)
        finally:
            running.stop()  # it ends its own servers
    if code is None:
        return f"did not end within {deadline_s:.0f} s"
    return f"ended with exit code {code}" if code else None


def _parser() -> argparse.ArgumentParser:
    known = tuple(job.name for job in JOBS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--jobs", type=names_of(known), default=known, metavar="NAME,NAME", help=",".join(known))
    add("--tp", type=int, default=2, help="GPUs of each server, and of the op (%(default)s)")
    machine.add_commit(parser)
    add("--output", type=Path, default=Path("benchmark-results"), help="folder (%(default)s)")
    add("--cpu", action="store_true", help="try it on a CPU, with one job: its times mean nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
