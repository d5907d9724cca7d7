"""Whole servers under load, stock and woven in turn: python -m benchmarks.serving --help.

SGLang's own client drives both. Two servers of a whole model do not fit one set of GPUs, so they
take turns: each round starts every server once, in a new order, and stops it again. Where they do
fit, `--together` starts all of them once; each load goes to one after the other then.
"""

import argparse
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import client, command, forward_timer, load, machine, shapes, timing
from benchmarks.forward_timer import Settings
from benchmarks.load import LoadError, Outcome, Target
from benchmarks.schema import Meta, Result, Row
from benchmarks.servers import HOST, UNBALANCED, Contender, running
from benchmarks.serving_table import NO_COMM, OURS
from launch import demo
from sglang_tokenweave import preflight

_WARM_UP = 32  # requests: they load the kernels of large batches, too
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=.*")
_SEED = 20250516


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__.partition("\n")[0]
    )
    add = found.add_argument
    model = found.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder or name, as of --model-path")
    model.add_argument("--shape", choices=shapes.SHAPES, help="one with random weights instead")
    add("--layers", type=int, help="of a shape (8; of mixtral-8x22b 4, for memory)")
    add("--tp", type=int, default=2, help="GPUs of each server (%(default)s)")
    add("--workloads", type=_workloads, default=load.WORKLOADS, help=",".join(load.WORKLOADS))
    add(
        "--rates", type=_rates, default=(math.inf,), help="requests a second, Poisson; inf: at once"
    )
    add(
        "--chunk-sizes",
        type=_chunk_sizes,
        default=(None,),
        metavar="TOKENS,...",
        help="chunks of prefill; for each size all servers start anew (SGLang's own choice)",
    )
    add("--prompts", type=int, default=256, help="requests of a workload (%(default)s)")
    add("--rounds", type=int, default=3, help="starts of each server (%(default)s)")
    add("--ttft-ms", type=float, default=1000, help="of a good request, at most (%(default)s)")
    add("--tpot-ms", type=float, default=50, help="of a good request, at most (%(default)s)")
    add("--both", default="", metavar="FLAGS", help="flags of every server")
    add("--stock-best", metavar="FLAGS", help="a second stock server, with its best flags")
    add("--ours", default="", metavar="FLAGS", help="flags of the woven server")
    add("--no-comm", action="store_true", help="also stock without sums over the ranks: the bound")
    add("--together", action="store_true", help="all servers on the GPUs at once, loads in turn")
    add("--cpu", action="store_true", help="try it on a CPU: the times mean nothing")
    add("--start-deadline", type=float, default=900, metavar="S", help="of a server (%(default)s)")
    add("--load-deadline", type=float, default=1800, metavar="S", help="of a load (%(default)s)")
    machine.add_arguments(found, "serving")
    found.set_defaults(chunk_size=None)  # the one of this turn
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save after each load and print; return an exit code as of `command.run`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    text = shlex.join(["python", "-m", "benchmarks.serving", *arguments])

    def measure() -> Result:
        seen: dict[tuple[str, str], list[Outcome]] = {}
        meta = machine.meta(options.tp, text, options.commit, options.rounds, smoke=options.cpu)
        with tempfile.TemporaryDirectory() as name:
            client.check(Path(name))
        for chunk_size in options.chunk_sizes:
            options.chunk_size = chunk_size
            _rounds(options, meta, seen)
        result = Result("serving", meta, _rows(seen))
        result.save(options.output)
        return result

    return command.run(measure)


def _rounds(
    options: argparse.Namespace, meta: Meta, seen: dict[tuple[str, str], list[Outcome]]
) -> None:
    """Measure with chunks of one size; should it be stopped, the file says how far it came."""
    with (
        _prepared(options) as (model, servers),
        _together(options, model, servers) as together,
    ):
        for number in range(options.rounds):
            chunks = f", chunks of {options.chunk_size} tokens" if options.chunk_size else ""
            this = f"round {number + 1} of {options.rounds}{chunks}"
            print(this, flush=True)
            begun = replace(meta, absent={"run": f"it was stopped in {this}"})
            for _ in _round(options, model, servers, number, seen, together):
                Result("serving", begun, _rows(seen)).save(options.output)


def contenders(options: argparse.Namespace, plugin: Path) -> list[Contender]:
    """Return the servers that take part; in the folder `plugin` is that of `forward_timer`."""
    both = shlex.split(options.both)
    both += ["--load-format", "dummy"] if options.shape else []
    both += ["--sleep-on-idle"] if options.together else []
    both += ["--chunked-prefill-size", str(options.chunk_size)] if options.chunk_size else []

    def server(
        variant: str, flags: str = "", *, weaves: bool = False, sums: bool = True
    ) -> Contender:
        own_flags, own = _flags_and_variables(flags)
        variables = [*([UNBALANCED] if options.together else []), *own]
        if options.shape or not sums:
            settings = Settings(no_communication=not sums, draws_weights=bool(options.shape))
            ours = (preflight.PLUGIN,) if weaves else ()
            variables += forward_timer.environment(settings, plugin, *ours).items()
        return Contender(variant, weaves, (*both, *own_flags), tuple(variables))

    found = [server("stock")]
    if options.stock_best is not None:
        found.append(server("stock/best", options.stock_best))
    found.append(server(OURS, options.ours, weaves=True))
    return [*found, server(NO_COMM, sums=False)] if options.no_comm else found


def _flags_and_variables(text: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Split what a shell would take: words such as A=1 in front set the environment."""
    words = shlex.split(text)
    count = next((i for i, word in enumerate(words) if not _VARIABLE.fullmatch(word)), len(words))
    pairs = [word.partition("=") for word in words[:count]]
    return words[count:], [(name, value) for name, _, value in pairs]


@contextmanager
def _prepared(options: argparse.Namespace) -> Iterator[tuple[str, list[Contender]]]:
    """Yield the model's name or folder, of a shape a new one, and the servers."""
    with tempfile.TemporaryDirectory() as name:
        servers = contenders(options, forward_timer.folder(Path(name, "plugin")))
        if options.model:
            yield options.model, servers
            return
        folder = shapes.write(options.shape, _layers(options), Path(name))
        shapes.write_tokenizer(options.shape, folder)
        yield str(folder), servers


def _layers(options: argparse.Namespace) -> int:
    return int(options.layers or shapes.SHAPES[options.shape].layers)


def _load_name(options: argparse.Namespace, workload: str, rate: float) -> str:
    """Return the shape of a row; a model by name is in the command only."""
    model = f"{options.shape}-{_layers(options)}l-tp{options.tp}-" if options.shape else ""
    chunks = f"-chunk{options.chunk_size}" if options.chunk_size else ""
    return f"{model}{workload}{chunks}-{load.rate_name(rate)}"


@contextmanager
def _server(options: argparse.Namespace, model: str, contender: Contender) -> Iterator[int]:
    with (
        tempfile.TemporaryDirectory() as name,
        running(
            contender,
            model,
            options.tp,
            Path(name, "log"),
            options.start_deadline,
            on_cpu=options.cpu,
        ) as port,
    ):
        yield port


@contextmanager
def _together(
    options: argparse.Namespace, model: str, servers: list[Contender]
) -> Iterator[dict[str, int]]:
    """Start all servers that run at once, one that may measure alone and first; yield their ports.

    By variant; of servers that take turns none.
    """
    together = servers if options.together else []
    first = [each for each in together if each.weaves and "--tokenweave-table" not in each.flags]
    with ExitStack() as stack:

        def start(contender: Contender) -> int:
            return stack.enter_context(_server(options, model, contender))

        ports = {each.variant: start(each) for each in first}
        others = [each for each in together if each not in first]
        with ThreadPoolExecutor(1 if options.cpu else len(others) or 1) as pool:
            ports |= zip([each.variant for each in others], pool.map(start, others), strict=True)
        yield ports


def _round(
    options: argparse.Namespace,
    model: str,
    servers: list[Contender],
    number: int,
    seen: dict[tuple[str, str], list[Outcome]],
    together: dict[str, int],
) -> Iterator[None]:
    """Run all loads on all servers once, yielding after each; another server is first each time."""
    first = number % len(servers)
    ordered = servers[first:] + servers[:first]
    loads = [(workload, rate) for workload in options.workloads for rate in options.rates]

    def drive(contender: Contender, port: int, workload: str, rate: float) -> None:
        variant = contender.variant
        found = _drive(options, model, port, workload, rate, number)
        plans = f", batches: {_batches(port)}" if contender.weaves else ""
        what = f"{variant}, {_named(workload, rate)}"
        print(f"{what}: {found.tokens_per_s:.0f} tokens/s{plans}", flush=True)
        seen.setdefault((_load_name(options, workload, rate), variant), []).append(found)

    for each in loads if together else ():
        for contender in ordered:
            drive(contender, together[contender.variant], *each)
            yield
    for contender in () if together else ordered:
        with _server(options, model, contender) as port:
            for each in loads:
                drive(contender, port, *each)
                yield


def _batches(port: int) -> dict[str, Any]:
    """Return how a woven server planned its batches until now."""
    state = demo.get_json(f"http://{HOST}:{port}/server_info")["internal_states"][0]
    found: dict[str, Any] = state["tokenweave"]["batches"]
    return found


def _drive(
    options: argparse.Namespace, model: str, port: int, workload: str, rate: float, number: int
) -> Outcome:
    """Put a server under one load; the same requests at the same times for every server."""
    target = Target(options.ttft_ms, options.tpot_ms)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            what = _requests(options, model, port, workload, rate, _SEED + number, folder)
            record = client.drive(what, folder, options.load_deadline)
        return load.outcome(record, options.prompts, target)
    except LoadError as error:
        raise LoadError(f"{_named(workload, rate)}: {error}") from error


def _requests(
    options: argparse.Namespace,
    model: str,
    port: int,
    workload: str,
    rate: float,
    seed: int,
    folder: Path,
) -> list[str]:
    """Return the client's arguments; its files go into `folder`."""
    word = shapes.WORD if options.shape else load.WORD
    return [
        *("--backend", "sglang", "--model", model, "--host", HOST, "--port", str(port)),
        *("--request-rate", str(rate), "--seed", str(seed), "--flush-cache"),
        *("--warmup-requests", str(_WARM_UP), "--disable-tqdm"),
        *load.client_arguments(workload, options.prompts, folder, seed, word),
    ]


def _named(workload: str, rate: float) -> str:
    return f"{workload} at {rate:g} requests a second"


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


def _chunk_sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) if size.isdecimal() else 0 for size in text.split(","))
    if not all(sizes) or len(set(sizes)) < len(sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected different numbers of tokens above 0, such as 1024,8192"
        )
    return sizes


if __name__ == "__main__":
    sys.exit(main())
