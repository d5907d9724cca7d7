"""Servers of one model on the same GPUs, each of whose forward passes is timed on every rank."""

import argparse
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import forward_timer, machine, shapes, timing
from benchmarks.forward_timer import Pass, Settings
from benchmarks.schema import Result, Row
from benchmarks.servers import HOST, UNBALANCED, Contender, running
from launch import demo
from sglang_tokenweave import preflight

T = TypeVar("T")

PEER = ("--enable-tokenweave", "--tokenweave-strict", "--tokenweave-transport", "peer")
RAISED = ("SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB", "131072")


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


STOCK = {"stock/default": Variant(), "stock/raised": Variant(variables=(RAISED,))}
AUTO = Variant((*PEER, "--tokenweave-tune", "force"), tunes=True)
NO_COMMUNICATION = Variant(no_communication=True)


@dataclass
class Served:
    """A running server and where its ranks' times are."""

    port: int
    output: Path
    world_size: int
    offsets: dict[int, int] = field(default_factory=dict)

    def passes(self, body: Mapping[str, Any]) -> list[list[Pass]]:
        """Send /generate a request; return the forward passes that it took, by rank."""
        for rank in range(self.world_size):  # what came before is not of this request
            self._read(rank)
        demo.post_json(f"http://{HOST}:{self.port}/generate", dict(body))
        return [self._read(rank) for rank in range(self.world_size)]

    def plans(self, mode: str) -> dict[str, int]:
        """Return how many batches of a mode got which plan; empty on a stock server."""
        counts: dict[str, int] = self._says().get("batches", {}).get(mode, {})
        return counts

    def excuses(self) -> str:
        """Return what the server says that it does without, and why batches did not run woven."""
        said = self._says()
        return "; ".join([*said.get("notes", ()), *said.get("fallbacks", ())])

    def _says(self) -> dict[str, Any]:
        state = demo.get_json(f"http://{HOST}:{self.port}/server_info")["internal_states"][0]
        ours: dict[str, Any] = state.get("tokenweave", {})
        return ours

    def _read(self, rank: int) -> list[Pass]:
        found, self.offsets[rank] = forward_timer.read(self.output, rank, self.offsets.get(rank, 0))
        return found


def sweep(
    result: Result,
    sizes: Iterable[int],
    unit: str,
    output: Path,
    one_size: Callable[[int], tuple[list[Row], dict[str, str]]],
) -> Result:
    """Add the rows of each size to a result, and what was absent; save and print after each."""
    for size in sizes:
        rows, absent = one_size(size)
        meta = replace(result.meta, absent={**result.meta.absent, **absent})
        result = Result(result.bench, meta, (*result.rows, *rows))
        result.save(output)
        times = ", ".join(f"{row.variant} {row.time_us:.0f}" for row in rows)
        print(f"{size} {unit}, us: {times}", flush=True)
    return result


def in_rounds(
    names: Iterable[str], rounds: int, sample: Callable[[str, int], T]
) -> dict[str, list[T]]:
    """Return what `sample(name, number)` gave in each round, which has an order of its own."""
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(-1, rounds):  # the first warms up
        for name in timing.round_order(list(found), number + 1):
            taken = sample(name, number)
            if number >= 0:
                found[name].append(taken)
    return found


def planned_since(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Return how many batches got which plan between two counts."""
    return {plan: count - before[plan] for plan, count in after.items()}


def ran_otherwise(name: str, counts: Mapping[str, int], excuses: Callable[[], str]) -> str | None:
    """Return how a server planned, if not all as the variant's name says; None: it did."""
    if counts.get(name.partition("/")[0], 0) == sum(counts.values()):
        return None
    return "; ".join(filter(None, [f"ran as {counts}", excuses()]))


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Return the share of the batches that each plan had, as columns of a row."""
    total = sum(counts.values())
    return {f"{plan}_share": count / total for plan, count in counts.items() if total}


def add_arguments(parser: argparse.ArgumentParser, variants: Sequence[str], bench: str) -> None:
    """Add what says which servers of which model there are."""
    names = names_of(variants)
    add = parser.add_argument
    add("--shape", choices=shapes.SHAPES, default="tp8rank", help="the model (%(default)s)")
    add("--layers", type=int, help="of the model (8; of mixtral-8x22b 4, for memory)")
    add("--tp", type=int, default=2, help="GPUs of each server (%(default)s)")
    add("--variants", type=names, default=tuple(variants), help=",".join(variants))
    add("--both", default="", metavar="FLAGS", help="flags of every server")
    add("--ours", default="", metavar="FLAGS", help="flags of each of ours, after its own")
    add("--cpu", action="store_true", help="try it on a CPU: the times mean nothing")
    add("--deadline", type=float, default=400, metavar="S", help="for all starts (%(default)s)")
    machine.add_arguments(parser, bench)


def names_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of names with commas between, which knows only these."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}; known: {', '.join(known)}")
        return found

    return names


def numbers(text: str) -> tuple[int, ...]:
    """Parse whole numbers with commas between."""
    return tuple(int(word) for word in text.split(","))


@contextmanager
def serving(
    options: argparse.Namespace,
    variants: Mapping[str, Variant],
    flags: Sequence[str],
    folder: Path,
    emulated_ranks: int = 0,
) -> Iterator[dict[str, Served]]:
    """Start the servers of `options.variants`; all at once, as a machine with many cores can.

    A server that tunes starts before the others.

    Raises:
        ServerError: one did not start.
    """
    model = shapes.write(options.shape, options.layers, folder)
    plugin = forward_timer.folder(folder / "plugin")
    with ExitStack() as stack:

        def start(name: str) -> Served:
            output = folder / name.replace("/", "-")
            output.mkdir()
            variant = variants[name]
            settings = Settings(
                str(output), variant.no_communication, emulated_ranks if variant.is_ours else 0
            )
            every = (*flags, *variant.flags, *shlex.split(options.both))
            if variant.is_ours:
                every += tuple(shlex.split(options.ours))
                every += ("--tokenweave-transport", "reference") if options.cpu else ()
            port = stack.enter_context(
                running(
                    contender(name, variant, every, settings, plugin),
                    str(model),
                    options.tp,
                    output / "log",
                    options.deadline,
                    on_cpu=options.cpu,
                )
            )
            print(f"{name} serves", flush=True)
            return Served(port, output, options.tp)

        servers = {name: start(name) for name in options.variants if variants[name].tunes}
        others = [name for name in options.variants if name not in servers]
        with ThreadPoolExecutor(1 if options.cpu else len(options.variants)) as pool:
            servers |= zip(others, pool.map(start, others), strict=True)
        yield servers


def contender(
    name: str, variant: Variant, flags: Sequence[str], settings: Settings, plugin: Path
) -> Contender:
    """Return a server that has the timer, and the extension if the variant is ours."""
    ours = (preflight.PLUGIN,) if variant.is_ours else ()
    variables = {
        **forward_timer.environment(settings, plugin, *ours),
        **dict([UNBALANCED]),
        **dict(variant.variables),
    }
    return Contender(name, variant.is_ours, tuple(flags), tuple(variables.items()))


def common_flags(*, on_cpu: bool) -> tuple[str, ...]:
    """Return what every timed server is given: random weights, one batch at a time to itself."""
    flags: tuple[str, ...] = (
        *("--load-format", "dummy", "--skip-tokenizer-init", "--sleep-on-idle"),
        *("--disable-radix-cache", "--sampling-backend", "pytorch"),
    )
    return flags if on_cpu else (*flags, "--attention-backend", "fa3")
