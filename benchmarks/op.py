"""Time the communication op and its rivals: python -m benchmarks.op --help."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import cases, machine, switches, table
from benchmarks.ranks import RankError, run_ranks
from benchmarks.schema import Result
from benchmarks.worker import VARIANTS, Options, Report, run_rank

_START_S = 20.0  # imports, groups, memory: 10 s where they were read before
_EVERY_VARIANT = ",".join(VARIANTS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, 1 if a variant gave wrong results or a rank failed, or 2."""
    options = _parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.op", *(arguments or sys.argv[1:])])
    switches.spread(os.environ)
    try:
        run = _prepare(options, command)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{len(run.options.cases)} sizes, {len(run.options.variants)} variants, "
        f"{run.options.rounds} rounds: about {run.estimate_s:.0f} of {options.seconds:g} s",
        flush=True,
    )
    try:
        result = _collect(run, options.deadline)
    except RankError as error:
        print(f"error: {error}\nWhat was measured before is in {options.output}", file=sys.stderr)
        return 1
    print(table.text(result))
    return 1 if any(text.startswith("wrong result") for text in result.meta.absent.values()) else 0


@dataclass(frozen=True)
class _Run:
    options: Options
    estimate_s: float
    result: Result  # still without rows
    output: Path


def _prepare(options: argparse.Namespace, command: str) -> _Run:
    world_size, smoke = _world_size(options)
    grid = cases.grid(_numbers(options.hidden), options.dtype, _numbers(options.tokens))
    variants = _names(options.variants)
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    plan = cases.plan(
        grid,
        len(variants) + 2,  # the floor is measured in two ways
        world_size,
        options.seconds,
        cache_bytes=cache_bytes,
        start_s=_START_S,
        smoke=smoke,
    )
    meta = machine.meta(world_size, command, options.commit, plan.rounds, smoke=smoke)
    run = Options(
        cases=tuple(grid),
        variants=tuple(variants),
        rounds=plan.rounds,
        ranks_per_gpu=options.ranks_per_gpu,
        cache_bytes=cache_bytes,
        end=time.monotonic() + options.seconds,
    )
    return _Run(run, plan.seconds, Result("op", meta, ()), options.output)


def _world_size(options: argparse.Namespace) -> tuple[int, bool]:
    """Return the number of ranks, and whether they share GPUs."""
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs NVIDIA GPUs, and torch finds none here")
    gpus, per_gpu = torch.cuda.device_count(), options.ranks_per_gpu
    world_size: int = options.world_size or gpus * per_gpu
    if per_gpu < 1 or not 2 <= world_size <= gpus * per_gpu:
        raise ValueError(
            f"{world_size} ranks on {gpus} GPUs: at least 2, one per GPU "
            "(--ranks-per-gpu 2 tries the program out on one GPU, without meaning of the times)"
        )
    return world_size, per_gpu > 1


def _collect(run: _Run, deadline_s: float) -> Result:
    """Run all ranks; the file is rewritten after each size, so that nothing measured is lost."""
    result = run.result
    world_size = result.meta.world_size
    ranks = run_ranks(run_rank, world_size, run.options, deadline_s=deadline_s)
    try:
        with closing(ranks) as reports:  # on any error the ranks end
            for _, report in reports:
                result = _merge(result, report)
                result.save(run.output)
                _print(report)
    except RankError as error:
        absent = {**result.meta.absent, "run": f"ended early: {str(error).splitlines()[0]}"}
        replace(result, meta=replace(result.meta, absent=absent)).save(run.output)
        raise
    return result


def _merge(result: Result, report: Report) -> Result:
    absent = {**result.meta.absent, **report.absent}
    return Result("op", replace(result.meta, absent=absent), result.rows + report.rows)


def _print(report: Report) -> None:
    for name, reason in report.absent.items():
        print(f"absent: {name}: {reason}", flush=True)
    if report.rows:
        first = report.rows[0]
        times = ", ".join(f"{row.variant} {row.time_us:.1f}" for row in report.rows)
        print(f"{first.shape} {first.tokens} tokens, us: {times}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.op", description=__doc__)
    parser.add_argument("--tokens", default=",".join(map(str, cases.TOKENS)))
    parser.add_argument("--hidden", default=",".join(map(str, cases.HIDDEN)))
    parser.add_argument("--dtype", default="bf16", choices=sorted(cases.DTYPES))
    parser.add_argument("--variants", default=_EVERY_VARIANT, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=480, help="for all but compiling")
    parser.add_argument(
        "--deadline", type=float, default=300, help="seconds for one phase of a rank"
    )
    parser.add_argument("--world-size", type=int, help="default: as many as there are GPUs")
    parser.add_argument("--ranks-per-gpu", type=int, default=1, help="2: a smoke test, no times")
    machine.add_arguments(parser, "op")
    return parser


def _numbers(text: str) -> list[int]:
    with suppress(ValueError):
        return [int(word) for word in text.split(",")]
    raise ValueError(f"{text!r}: expected whole numbers with commas between them")


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"variant {unknown[0]!r}: allowed are {_EVERY_VARIANT}")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
