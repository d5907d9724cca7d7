"""Prefill of one model shape, ours and stock in turn: python -m benchmarks.prefill --help.

All variants are servers on the same GPUs, all started before the first request. In each round
every one of them is sent one request, in a new order; the others idle meanwhile. What is timed is
SGLang's forward pass, from its call on the last rank to the end of all ranks' work on the device.
"""

import argparse
import os
import random
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command, forward_timer, machine, shapes, switches, timed_servers, timing
from benchmarks.schema import Meta, Result, Row
from benchmarks.servers import ServerError
from benchmarks.timed_servers import AUTO, NO_COMMUNICATION, PEER, STOCK, Served, Variant

TOKENS = (512, 1024, 1536, 2048, 2500, 3072, 4096, 6144, 8192, 16384, 32768)
_GRAPH_TOKENS = (512, 1024, 1536, 2048, 2560, 3072, 4096, 6144, 8192)
_CONTEXT = 40000


def _ours(*flags: str) -> Variant:
    return Variant((*PEER, "--tokenweave-min-tokens", "512", *flags))


VARIANTS = {
    **STOCK,
    "fuse": Variant(
        (*PEER, "--tokenweave-fuse-min-tokens", "1", "--tokenweave-min-tokens", "1000000")
    ),
    "weave/kernel/4": _ours("--tokenweave-ctas", "4"),
    "weave/kernel/8": _ours("--tokenweave-ctas", "8"),
    "weave/copy": _ours("--tokenweave-ctas", "0"),
    "auto": AUTO,
    "weave/eager": _ours("--cuda-graph-backend-prefill", "disabled"),
    "no_comm": NO_COMMUNICATION,
}


def prefill(server: Served, ids: list[int]) -> tuple[float, float]:
    """Send one request; return the forward passes' microseconds and those of their CPU part.

    On all ranks; a prompt longer than a chunk takes several passes.

    Raises:
        ServerError: a rank's passes are not those of this request.
    """
    sampling = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}
    ranks = []
    for rank, every in enumerate(server.passes({"input_ids": ids, "sampling_params": sampling})):
        passes = [each for each in every if each.mode == "EXTEND"]
        seen = [each.tokens for each in passes]
        if sum(seen) != len(ids):
            raise ServerError(f"rank {rank} ran passes of {seen} tokens for a prompt of {len(ids)}")
        ranks.append(passes)
    walls, cpus = zip(*map(forward_timer.together, zip(*ranks, strict=True)), strict=True)
    return sum(walls), sum(cpus)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.prefill", description=__doc__.partition("\n")[0]
    )
    timed_servers.add_arguments(found, tuple(VARIANTS), "prefill")
    add = found.add_argument
    add("--tokens", type=timed_servers.numbers, default=TOKENS, metavar="N,N", help="of prompts")
    add("--rounds", type=int, default=9, help="requests of each length (%(default)s)")
    add(
        "--emulated-ranks",
        type=int,
        default=0,
        metavar="N",
        help="on one GPU (--tp 1): ours runs the kernels of N ranks; stock has no communication",
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save after each length and print; return an exit code as of `command.run`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.layers = options.layers or shapes.SHAPES[options.shape].layers
    text = shlex.join(["python", "-m", "benchmarks.prefill", *arguments])
    switches.spread(os.environ)

    def measure() -> Result:
        _check(options)
        meta = machine.meta(options.tp, text, options.commit, options.rounds, smoke=options.cpu)
        flags, ranks = _flags(options), options.emulated_ranks
        with (
            tempfile.TemporaryDirectory() as name,
            timed_servers.serving(options, VARIANTS, flags, Path(name), ranks) as servers,
        ):
            return _measure(options, meta, servers)

    return command.run(measure)


def _check(options: argparse.Namespace) -> None:
    lacking = {"weave/copy", "no_comm"} if options.emulated_ranks or options.cpu else set()
    for name in options.variants:
        if name in lacking:
            raise RuntimeError(f"--variants: {name} needs GPUs that communicate: leave it out")
    if options.emulated_ranks and options.tp != 1:
        raise RuntimeError(f"--tp is {options.tp}; with --emulated-ranks it must be 1")


def _measure(options: argparse.Namespace, meta: Meta, servers: dict[str, Served]) -> Result:
    return timed_servers.sweep(
        Result("prefill", meta, ()),
        options.tokens,
        "tokens",
        options.output,
        lambda tokens: _one_length(options, servers, tokens),
    )


def _one_length(
    options: argparse.Namespace, servers: dict[str, Served], tokens: int
) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of one prompt length, and what did not run as its name says."""
    before = {name: server.plans("prefill") for name, server in servers.items()}
    rounds = timed_servers.in_rounds(
        servers,
        options.rounds,
        lambda name, number: prefill(servers[name], _prompt(options, tokens, number, name)),
    )
    rows, absent = [], {}
    for name, server in servers.items():
        counts = timed_servers.planned_since(before[name], server.plans("prefill"))
        problem = timed_servers.ran_otherwise(name, counts, server.excuses)
        if problem and not VARIANTS[name].tunes:
            absent[f"{name}, {tokens} tokens"] = problem
            continue
        time = timing.summarize([wall for wall, _ in rounds[name]])
        cpu = timing.summarize([cpu for _, cpu in rounds[name]])
        extra = {"cpu_us_per_layer": cpu.time_us / options.layers}
        if VARIANTS[name].tunes:
            extra |= timed_servers.shares(counts)
        shape = f"{options.shape}-{options.layers}l-tp{options.tp}"
        rows.append(Row(shape, tokens, name, time.time_us, time.spread_us, extra))
    return rows, absent


def _prompt(options: argparse.Namespace, tokens: int, number: int, name: str) -> list[int]:
    """Return a prompt that no server's cache holds the beginning of."""
    draw = random.Random(f"{tokens} {number} {name}")
    most = shapes.SHAPES[options.shape].vocabulary
    return [draw.randrange(3, most) for _ in range(tokens)]


def _flags(options: argparse.Namespace) -> tuple[str, ...]:
    flags = timed_servers.common_flags(on_cpu=options.cpu)
    if options.cpu:
        return (*flags, "--chunked-prefill-size", "4096")
    return (
        *flags,
        *("--max-total-tokens", str(_CONTEXT)),
        *("--mem-fraction-static", "0.85", "--chunked-prefill-size", "8192"),
        *("--cuda-graph-bs-prefill", *map(str, _GRAPH_TOKENS), "--cuda-graph-bs-decode", "1"),
    )


if __name__ == "__main__":
    sys.exit(main())
