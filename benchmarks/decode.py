"""Decode steps of one model shape, ours and stock in turn: python -m benchmarks.decode --help.

All variants are servers on the same GPUs, all started before the first request. In each round
every one of them is sent one batch of prompts, in a new order, and decodes it; the others idle
meanwhile. What is timed is SGLang's forward pass of every step that has all requests in it, from
its call on the last rank to the end of all ranks' work on the device.
"""

import argparse
import os
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command, forward_timer, machine, shapes, switches, timed_servers, timing
from benchmarks.schema import Meta, Result, Row
from benchmarks.servers import ServerError
from benchmarks.timed_servers import AUTO, NO_COMMUNICATION, PEER, STOCK, Served, Variant

REQUESTS = (1, 8, 32, 64, 128, 256, 512)
_NEVER = ("--tokenweave-min-tokens", "1000000")  # prefills run stock
_LEAST_STEPS = 4  # that have all requests in them


VARIANTS = {
    **STOCK,
    "fuse": Variant((*PEER, *_NEVER, "--tokenweave-fuse-min-tokens", "1")),
    "weave/kernel/8": Variant((*PEER, *_NEVER, "--tokenweave-decode-min-tokens", "2")),
    "weave/copy": Variant(
        (*PEER, *_NEVER, "--tokenweave-decode-min-tokens", "2", "--tokenweave-ctas", "0")
    ),
    "auto": AUTO,
    "no_comm": NO_COMMUNICATION,
}


def decode(server: Served, prompts: list[list[int]], steps: int) -> float:
    """Let a server decode prompts together; return a step's microseconds, on all ranks.

    Raises:
        ServerError: too few steps had all of them.
    """
    sampling = {"max_new_tokens": steps, "temperature": 0, "ignore_eos": True}
    ranks = []
    for every in server.passes({"input_ids": prompts, "sampling_params": sampling}):
        whole = [each for each in every if each.mode == "DECODE" and each.tokens == len(prompts)]
        if len(whole) < _LEAST_STEPS:
            raise ServerError(f"{len(whole)} steps decoded all {len(prompts)} requests together")
        ranks.append(whole)
    walls = [forward_timer.together(step)[0] for step in zip(*ranks, strict=True)]
    return float(statistics.median(walls))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__.partition("\n")[0]
    )
    timed_servers.add_arguments(found, tuple(VARIANTS), "decode")
    add = found.add_argument
    add("--requests", type=timed_servers.numbers, default=REQUESTS, metavar="N,N", help="a batch")
    add("--context", type=int, default=256, help="tokens of each prompt (%(default)s)")
    add("--steps", type=int, default=24, help="tokens to decode after it (%(default)s)")
    add("--rounds", type=int, default=7, help="batches of each size (%(default)s)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save after each size and print; return an exit code as of `command.run`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.layers = options.layers or shapes.SHAPES[options.shape].layers
    text = shlex.join(["python", "-m", "benchmarks.decode", *arguments])
    switches.spread(os.environ)

    def measure() -> Result:
        meta = machine.meta(options.tp, text, options.commit, options.rounds, smoke=options.cpu)
        with (
            tempfile.TemporaryDirectory() as name,
            timed_servers.serving(options, VARIANTS, _flags(options), Path(name)) as servers,
        ):
            return _measure(options, meta, servers)

    return command.run(measure)


def _measure(options: argparse.Namespace, meta: Meta, servers: dict[str, Served]) -> Result:
    return timed_servers.sweep(
        Result("decode", meta, ()),
        options.requests,
        "requests",
        options.output,
        lambda requests: _one_size(options, servers, requests),
    )


def _one_size(
    options: argparse.Namespace, servers: dict[str, Served], requests: int
) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of one batch size, and what did not run as its name says."""
    before = {name: server.plans("decode") for name, server in servers.items()}
    rounds = timed_servers.in_rounds(
        servers,
        options.rounds,
        lambda name, number: decode(
            servers[name], _prompts(options, requests, number), options.steps
        ),
    )
    rows, absent = [], {}
    for name, server in servers.items():
        counts = timed_servers.planned_since(before[name], server.plans("decode"))
        problem = timed_servers.ran_otherwise(name, counts, server.excuses)
        if problem and not VARIANTS[name].tunes:
            absent[f"{name}, {requests} requests"] = problem
            continue
        time = timing.summarize(rounds[name])
        extra = {
            "tokens_per_s": 1e6 * requests / time.time_us,
            "context_tokens": options.context + options.steps // 2,
        }
        if VARIANTS[name].tunes:
            extra |= timed_servers.shares(counts)
        shape = f"{options.shape}-{options.layers}l-tp{options.tp}"
        rows.append(Row(shape, requests, name, time.time_us, time.spread_us, extra))
    return rows, absent


def _prompts(options: argparse.Namespace, requests: int, number: int) -> list[list[int]]:
    """Return the prompts of a round, the same for every server: none keeps what it has read."""
    draw = random.Random(f"{requests} {number}")
    most = shapes.SHAPES[options.shape].vocabulary
    return [[draw.randrange(3, most) for _ in range(options.context)] for _ in range(requests)]


def _flags(options: argparse.Namespace) -> tuple[str, ...]:
    flags = timed_servers.common_flags(on_cpu=options.cpu)
    if options.cpu:
        return flags
    most = max(options.requests)
    tokens = most * (options.context + options.steps + 1) + 16384
    return (
        *flags,
        *("--max-total-tokens", str(tokens), "--max-running-requests", str(most)),
        *("--mem-fraction-static", "0.85", "--chunked-prefill-size", "8192"),
        *("--cuda-graph-bs-prefill", "8192"),
        *("--cuda-graph-bs-decode", *map(str, sorted(options.requests))),
    )


if __name__ == "__main__":
    sys.exit(main())
