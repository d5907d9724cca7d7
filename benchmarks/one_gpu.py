"""What one GPU can say about the fused kernel: python -m benchmarks.one_gpu --help.

All ranks on one GPU, each with CTAs of its own, so that no link is involved: what is left is how
fast the SMs that a rank occupies do their work. Beside it stands the most that such SMs can move
(sm_limits.cu): a rank's rows read and written by the same number of CTAs without any arithmetic.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from benchmarks import machine, timing
from benchmarks.limits import HIDDEN, NUM_RANKS, PARTS, Mover
from benchmarks.schema import Result, Row
from sglang_tokenweave.emulation import EmulatedRanks

WORLD_SIZE = NUM_RANKS
CTAS = (2, 4, 8, 16, 32)
TOKENS = (64, 256, 1024, 4096, 8192)
EPS = 1e-5
ROUNDS = 9
_CALLS = 4
_LIMITS = {"read": (True, False), "write": (False, True), "read+write": (True, True)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and save; return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_gpu")
    machine.add_arguments(parser, "one_gpu")
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.one_gpu", *(arguments or sys.argv[1:])])
    meta = machine.meta(WORLD_SIZE, command, options.commit, ROUNDS, smoke=False)
    rows: list[Row] = []
    for tokens in TOKENS:
        rows += _measure(tokens)
        times = ", ".join(f"{r.variant} {r.time_us:.1f}" for r in rows if r.tokens == tokens)
        print(f"{tokens} tokens, us: {times}", flush=True)
    Result("one_gpu", meta, tuple(rows)).save(options.output)
    return 0


def _measure(tokens: int) -> list[Row]:
    ranks = EmulatedRanks(WORLD_SIZE, tokens, HIDDEN, torch.bfloat16)
    for buffer in ranks.x:
        buffer.normal_()
    share = -(-tokens // WORLD_SIZE)
    moved = torch.randn(2, PARTS, share, HIDDEN, device="cuda").to(torch.bfloat16)
    calls = {f"fused/{ctas}": _fused(ranks, tokens, ctas) for ctas in CTAS}
    for name, flags in _LIMITS.items():
        calls |= {f"{name}/{ctas}": _limit(flags, moved, share, ctas) for ctas in CTAS}
    # A captured graph keeps no memory alive: `calls` does, as long as the samples are taken.
    samples = {name: timing.capture(call, _CALLS, nullcontext()) for name, call in calls.items()}
    times = timing.measure(samples, ROUNDS, lambda _name, _round: None, lambda: True)
    summaries = {name: timing.summarize(rounds) for name, rounds in times.items()}
    shape = f"h{HIDDEN}-bf16"
    return [Row(shape, tokens, n, s.time_us, s.spread_us) for n, s in summaries.items()]


def _fused(ranks: EmulatedRanks, tokens: int, ctas: int) -> Callable[[int], None]:
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
    everyone = range(WORLD_SIZE)
    rows = [ranks.rows(rank, ranks.x, 0, tokens) for rank in everyone]
    owned = [rows[rank].slot.owned_rows(rank, WORLD_SIZE) for rank in everyone]
    shards = [
        torch.randn(own.stop - own.start, HIDDEN, device="cuda").to(torch.bfloat16) for own in owned
    ]

    def call(_index: int) -> None:
        ranks.fork()
        for rank in everyone:
            x = rows[rank]
            ranks.launch(rank, x, x, shards[rank], weight, EPS, 0.0, ctas=ctas)
        ranks.join()

    return call


def _limit(
    flags: tuple[bool, bool], moved: torch.Tensor, rows: int, ctas: int
) -> Callable[[int], None]:
    reads, writes = flags
    mover = Mover(reads=reads, writes=writes)
    source, target = ([part.data_ptr() for part in parts] for parts in moved)
    return lambda _index: mover.launch(source, target, rows, ctas)


if __name__ == "__main__":
    sys.exit(main())
