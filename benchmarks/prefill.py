"""Prefill of one model shape, ours and stock in turn: python -m benchmarks.prefill --help.

All variants are servers on the same GPUs, all started before the first request. In each round
every one of them is sent one request, in a new order; the others idle meanwhile. What is timed is
SGLang's forward pass on each rank, from its call to the end of its work on the device.
"""

import argparse
import os
import random
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import forward_timer, machine, shapes, switches, table, timing
from benchmarks.forward_timer import Pass, Settings
from benchmarks.schema import Meta, Result, Row
from benchmarks.servers import HOST, Contender, ServerError, running
from launch import demo

ROOT = Path(__file__).resolve().parent.parent
TOKENS = (512, 1024, 1536, 2048, 2500, 3072, 4096, 6144, 8192, 16384, 32768)
_GRAPH_TOKENS = (512, 1024, 1536, 2048, 2560, 3072, 4096, 6144, 8192)
_PEER = ("--enable-tokenweave", "--tokenweave-strict", "--tokenweave-transport", "peer")
_RAISED = ("SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB", "131072")
_CONTEXT = 40000


@dataclass(frozen=True)
class Variant:
    """A server that takes part: flags of its own, and what the timer does in it."""

    flags: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    no_communication: bool = False
    tunes: bool = False  # measures at its start: no other server may start meanwhile

    @property
    def is_ours(self) -> bool:
        return "--enable-tokenweave" in self.flags


def _ours(*flags: str) -> Variant:
    return Variant((*_PEER, "--tokenweave-min-tokens", "512", *flags))


VARIANTS = {
    "stock/default": Variant(),
    "stock/raised": Variant(variables=(_RAISED,)),
    "fuse": Variant(
        (*_PEER, "--tokenweave-fuse-min-tokens", "1", "--tokenweave-min-tokens", "1000000")
    ),
    "weave/kernel/4": _ours("--tokenweave-ctas", "4"),
    "weave/kernel/8": _ours("--tokenweave-ctas", "8"),
    "weave/copy": _ours("--tokenweave-ctas", "0"),
    "auto": Variant((*_PEER, "--tokenweave-tune", "force"), tunes=True),
    "weave/eager": _ours("--cuda-graph-backend-prefill", "disabled"),
    "no_comm": Variant(no_communication=True),
}


@dataclass
class Served:
    """A running server and where its ranks' times are."""

    port: int
    output: Path
    world_size: int
    offsets: dict[int, int] = field(default_factory=dict)

    def prefill(self, ids: list[int]) -> tuple[float, float]:
        """Send one request; return the forward passes' microseconds and those of their CPU part.

        Of the slowest rank; a prompt longer than a chunk takes several passes.

        Raises:
            ServerError: a rank's passes are not those of this request.
        """
        sampling = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling}
        for rank in range(self.world_size):  # what came before is not of this request
            self._read(rank)
        demo.post_json(f"http://{HOST}:{self.port}/generate", body)
        ranks = [self._passes(rank, len(ids)) for rank in range(self.world_size)]
        return max(ranks)

    def _passes(self, rank: int, tokens: int) -> tuple[float, float]:
        passes = [each for each in self._read(rank) if each.mode == "EXTEND"]
        if sum(each.tokens for each in passes) != tokens:
            seen = [each.tokens for each in passes]
            raise ServerError(f"rank {rank} ran passes of {seen} tokens for a prompt of {tokens}")
        return sum(each.wall_us for each in passes), sum(each.cpu_us for each in passes)

    def _read(self, rank: int) -> list[Pass]:
        found, self.offsets[rank] = forward_timer.read(self.output, rank, self.offsets.get(rank, 0))
        return found

    def plans(self) -> dict[str, int]:
        """Return how many prefills got which plan; empty on a stock server."""
        state = demo.get_json(f"http://{HOST}:{self.port}/server_info")["internal_states"][0]
        counts: dict[str, int] = state.get("tokenweave", {}).get("batches", {}).get("prefill", {})
        return counts


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.prefill", description=__doc__.partition("\n")[0]
    )
    add = found.add_argument
    add("--shape", choices=shapes.SHAPES, default="tp8rank", help="the model (%(default)s)")
    add("--layers", type=int, default=8, help="of the model (%(default)s)")
    add("--tp", type=int, default=2, help="GPUs of each server (%(default)s)")
    add("--tokens", type=_numbers, default=TOKENS, metavar="N,N", help="prompt lengths")
    add("--variants", type=_variants, default=tuple(VARIANTS), help=",".join(VARIANTS))
    add("--rounds", type=int, default=9, help="requests of each length (%(default)s)")
    add("--both", default="", metavar="FLAGS", help="flags of every server")
    add(
        "--emulated-ranks",
        type=int,
        default=0,
        metavar="N",
        help="on one GPU (--tp 1): ours runs the kernels of N ranks; stock has no communication",
    )
    add("--cpu", action="store_true", help="try it on a CPU: the times mean nothing")
    add("--deadline", type=float, default=400, metavar="S", help="for all starts (%(default)s)")
    machine.add_arguments(found, "prefill")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save after each length and print; return 0, 1 if a server failed, or 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.prefill", *arguments])
    switches.spread(os.environ)
    try:
        _check(options)
        meta = machine.meta(options.tp, command, options.commit, options.rounds, smoke=options.cpu)
        with tempfile.TemporaryDirectory() as name, _served(options, Path(name)) as servers:
            result = _measure(options, meta, servers)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.text(result))
    return 0


def _check(options: argparse.Namespace) -> None:
    lacking = {"weave/copy", "no_comm"} if options.emulated_ranks or options.cpu else set()
    for name in options.variants:
        if name in lacking:
            raise RuntimeError(f"--variants: {name} needs GPUs that communicate: leave it out")
    if options.emulated_ranks and options.tp != 1:
        raise RuntimeError(f"--tp is {options.tp}; with --emulated-ranks it must be 1")


def _measure(options: argparse.Namespace, meta: Meta, servers: dict[str, Served]) -> Result:
    rows: list[Row] = []
    absent: dict[str, str] = {}
    for tokens in options.tokens:
        found, missing = _one_length(options, servers, tokens)
        rows += found
        absent |= missing
        result = Result("prefill", replace(meta, absent=absent), tuple(rows))
        result.save(options.output)
        times = ", ".join(f"{row.variant} {row.time_us:.0f}" for row in found)
        print(f"{tokens} tokens, us: {times}", flush=True)
    return result


def _one_length(
    options: argparse.Namespace, servers: dict[str, Served], tokens: int
) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of one prompt length, and what did not run as its name says."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    before = {name: server.plans() for name, server in servers.items()}
    for number in range(-1, options.rounds):  # the first warms up
        for name in timing.round_order(list(servers), number + 1):
            sample = servers[name].prefill(_prompt(options, tokens, number, name))
            if number >= 0:
                rounds[name].append(sample)
    rows, absent = [], {}
    for name, server in servers.items():
        wanted = name.partition("/")[0]
        plans = {plan: n - before[name][plan] for plan, n in server.plans().items()}
        if plans.get(wanted, 0) < sum(plans.values()) and not VARIANTS[name].tunes:
            absent[f"{name}, {tokens} tokens"] = f"ran as {plans}"
            continue
        time = timing.summarize([wall for wall, _ in rounds[name]])
        cpu = timing.summarize([cpu for _, cpu in rounds[name]])
        extra = {"cpu_us_per_layer": cpu.time_us / options.layers}
        shape = f"{options.shape}-{options.layers}l-tp{options.tp}"
        rows.append(Row(shape, tokens, name, time.time_us, time.spread_us, extra))
    return rows, absent


def _prompt(options: argparse.Namespace, tokens: int, number: int, name: str) -> list[int]:
    """Return a prompt that no server's cache holds the beginning of."""
    draw = random.Random(f"{tokens} {number} {name}")
    most = shapes.SHAPES[options.shape].vocabulary
    return [draw.randrange(3, most) for _ in range(tokens)]


@contextmanager
def _served(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Served]]:
    """Start all servers at once, which a machine with many cores does in the time of one.

    A server that tunes starts before the others.
    """
    model = shapes.write(options.shape, options.layers, folder)
    plugin = forward_timer.folder(folder / "plugin")
    with ExitStack() as stack:

        def start(name: str) -> Served:
            output = folder / name.replace("/", "-")
            output.mkdir()
            contender = _contender(options, name, plugin, output)
            server = running(
                contender,
                str(model),
                options.tp,
                output / "log",
                options.deadline,
                on_cpu=options.cpu,
            )
            port = stack.enter_context(server)
            print(f"{name} serves", flush=True)
            return Served(port, output, options.tp)

        servers = {name: start(name) for name in options.variants if VARIANTS[name].tunes}
        others = [name for name in options.variants if name not in servers]
        with ThreadPoolExecutor(1 if options.cpu else len(options.variants)) as pool:
            servers |= zip(others, pool.map(start, others), strict=True)
        yield servers


def _contender(options: argparse.Namespace, name: str, plugin: Path, output: Path) -> Contender:
    variant = VARIANTS[name]
    emulated = options.emulated_ranks if variant.is_ours else 0
    settings = Settings(str(output), variant.no_communication, emulated)
    ours = ("tokenweave",) if variant.is_ours else ()
    paths = [str(plugin), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        **forward_timer.environment(settings),
        "PYTHONPATH": os.pathsep.join(paths),
        "SGLANG_PLUGINS": ",".join((*ours, forward_timer.NAME)),
        # The servers start side by side, so a rank may find less memory than another.
        "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK": "1",
        **dict(variant.variables),
    }
    flags = (*_common_flags(options), *variant.flags, *shlex.split(options.both))
    if options.cpu and variant.is_ours:
        flags += ("--tokenweave-transport", "reference")
    return Contender(name, variant.is_ours, flags, tuple(variables.items()))


def _common_flags(options: argparse.Namespace) -> tuple[str, ...]:
    flags: tuple[str, ...] = (
        *("--load-format", "dummy", "--skip-tokenizer-init", "--sleep-on-idle"),
        *("--disable-radix-cache", "--sampling-backend", "pytorch"),
    )
    if options.cpu:
        return (*flags, "--chunked-prefill-size", "4096")
    return (
        *flags,
        *("--attention-backend", "fa3", "--max-total-tokens", str(_CONTEXT)),
        *("--mem-fraction-static", "0.85", "--chunked-prefill-size", "8192"),
        *("--cuda-graph-bs-prefill", *map(str, _GRAPH_TOKENS), "--cuda-graph-bs-decode", "1"),
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _variants(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"{name!r}; known: {', '.join(VARIANTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
