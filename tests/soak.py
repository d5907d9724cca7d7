"""Hold a woven server under a fixed load and see whether anything grows.

`python tests/soak.py --minutes 60 --rate 4 --output docs/reliability/soak.json` starts a server on
the CPU (TP=2), sends it random requests as a Poisson process, and looks at all its processes every
few seconds; with `--gpus`, on two GPUs. Every sample goes to a .csv beside the output as it is
taken; the table is rewritten each minute. Exit status 0: no error, and every slope below its bound.
"""

import argparse
import asyncio
import csv
import itertools
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import footprint
import load
import recording
from load import Mix, Request, Sample
from server import Server
from slopes import Slope, slope
from soak_servers import ENVIRONMENT, make_model, server_of

# bfloat16 rounds a prompt's log probabilities by some hundredths, otherwise in another batch;
# another prompt's are off by more than 1.
CANARY_TOLERANCE = 0.5
LOOK_S = 4
CANARY_EVERY = 40  # requests
MOST_IN_FLIGHT = 400  # then the rate is more than the server can do, which proves nothing
MOST_ERRORS = 20  # then it ends: the bar is none
# Below what a leak of one a minute makes, in an hour and more so in less ...
COUNT_PER_S = 0.5 / 60
BYTES_PER_REQUEST = 2048
# ... but a short run tells no growth below these from what comes and goes.
SHORT_S = 600
LEAST_COUNT = 12
LEAST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Look:
    """What was seen at one time since the start of the load."""

    at_s: float
    completed: int
    errors: tuple[str, ...]
    figures: dict[str, float]

    def row(self) -> dict[str, float]:
        """Return it for a table of all."""
        counts = {"completed": self.completed, "errors": len(self.errors)}
        return {"seconds": round(self.at_s, 1), **counts, **self.figures}


@dataclass(frozen=True)
class Verdict:
    """How one figure went; `bound_per_s` is None where nothing is asked of it."""

    name: str
    first: float
    last: float
    slope: Slope
    bound_per_s: float | None

    @property
    def is_kept(self) -> bool:
        """Return whether the slope is below its bound with `slopes.CONFIDENCE`."""
        return self.bound_per_s is None or self.slope.high < self.bound_per_s


@dataclass
class Load:
    """Requests on their way, and what became of the others."""

    mix: Mix
    completed: int = 0
    left: int = 0
    errors: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)  # since the last look
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)
    is_exact: bool = True  # equal requests have equal answers, whatever else is in their batches
    canary: list[Sample] = field(default_factory=list)

    async def arrive(self, session: object, rate: float, seconds: float) -> None:
        """Send requests at random times, `rate` a second on average; then wait for all."""
        rng = random.Random(self.mix.seed)
        start = due = time.monotonic()
        for index in itertools.count():
            due += rng.expovariate(rate)
            if due - start > seconds:
                break
            await asyncio.sleep(due - time.monotonic())
            if len(self.tasks) >= MOST_IN_FLIGHT:
                self.errors.append(f"{MOST_IN_FLIGHT} requests in flight: --rate is too high")
            if len(self.errors) >= MOST_ERRORS or len(self.tasks) >= MOST_IN_FLIGHT:
                break
            task = asyncio.create_task(self._run(session, index))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        if self.tasks:
            await asyncio.wait(set(self.tasks))  # each has a deadline

    async def _run(self, session: object, index: int) -> None:
        is_canary = index % CANARY_EVERY == 0
        request = CANARY if is_canary else load.draw(self.mix, index)
        start = time.monotonic()
        try:
            samples = await load.ask(session, request)
        except Exception as error:  # noqa: BLE001 - whatever it was, it is told
            self.errors.append(f"request {index}: {type(error).__name__}: {error}")
            return
        self.completed += 1
        self.left += request.leave_after is not None
        self.latencies_s.append(time.monotonic() - start)
        if is_canary:
            self.canary = self.canary or samples
            if not self._is_as_before(samples):
                self.errors.append(f"request {index}: the canary's answer changed")

    def _is_as_before(self, samples: list[Sample]) -> bool:
        (first,), (now,) = self.canary, samples
        if self.is_exact:
            return now.tokens == first.tokens
        prompt = CANARY.payload["input_ids"]
        pairs = list(zip(first.logprobs, now.logprobs, strict=True))[: len(prompt) - 1]
        return all(abs(a - b) <= CANARY_TOLERANCE for a, b in pairs)


# The same greedy request over and over: its answer may not change.
CANARY = Request(
    "/generate",
    {
        "input_ids": list(range(10, 700)),
        "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    },
)


async def soak(
    server: Server,
    mix: Mix,
    rate: float,
    seconds: float,
    see: Callable[[Look], None],
    *,
    is_exact: bool = True,
) -> Load:
    """Run the load; call `see` every `LOOK_S` seconds."""
    current = Load(mix, is_exact=is_exact)
    start = time.monotonic()

    async def look_around() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            held = await asyncio.to_thread(footprint.measure, server)
            see(_look(time.monotonic() - start, current, held))

    async with load.open_session(server.url) as session:
        looking = asyncio.create_task(look_around())
        arriving = asyncio.create_task(current.arrive(session, rate, seconds))
        await asyncio.wait({looking, arriving}, return_when=asyncio.FIRST_COMPLETED)
        arriving.cancel()
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking  # it ends before only by an error, which is raised here
        await arriving
    return current


def _look(at_s: float, current: Load, held: footprint.Footprint) -> Look:
    taken, current.latencies_s = current.latencies_s, []
    figures = (
        held.series()
        | footprint.gpu_memory()
        | {
            "requests in flight": len(current.tasks),
            "completed a second": len(taken) / LOOK_S,
            "median latency": statistics.median(taken) if taken else 0.0,
            "CPU seconds": sum(held.cpu_s.values()),
        }
    )
    return Look(at_s, current.completed, tuple(current.errors), figures)


def judge(looks: Sequence[Look], warm_up_s: float) -> list[Verdict]:
    """Return how each figure went after the first `warm_up_s` seconds.

    Raises:
        ValueError: there are too few looks.
    """
    warm = [each for each in looks if each.at_s >= warm_up_s]
    times = [each.at_s for each in warm]
    if len(warm) < 8:
        raise ValueError(f"{len(warm)} looks after the warm-up; run for longer")
    span_s = times[-1] - times[0]
    rate = (warm[-1].completed - warm[0].completed) / span_s
    verdicts = []
    for name in warm[0].figures:
        values = [each.figures.get(name, 0.0) for each in warm]
        found = slope(times, values)
        verdicts.append(Verdict(name, values[0], values[-1], found, _bound(name, rate, span_s)))
    return verdicts


def _bound(name: str, rate: float, span_s: float) -> float | None:
    is_short = span_s < SHORT_S
    kind = name.split()[0]
    if kind == "memory":
        return max(BYTES_PER_REQUEST * rate, is_short * LEAST_BYTES / span_s)
    if kind in ("descriptors", "threads", "files", "requests"):
        return max(COUNT_PER_S, is_short * LEAST_COUNT / span_s)
    return None


UNITS = {"memory": (2**20, "MiB"), "median": (1e-3, "ms"), "CPU": (1, "s")}


def _row(verdict: Verdict) -> list[str]:
    divisor, unit = UNITS.get(verdict.name.split()[0], (1, ""))
    low, mid, high = (
        3600 * each / divisor
        for each in (verdict.slope.low, verdict.slope.per_s, verdict.slope.high)
    )
    bound = verdict.bound_per_s
    return [
        f"{verdict.name}, {unit}" if unit else verdict.name,
        f"{verdict.first / divisor:.4g}",
        f"{verdict.last / divisor:.4g}",
        f"{mid:.3g} ({low:.3g} to {high:.3g})",
        "" if bound is None else f"{3600 * bound / divisor:.3g}",
        "" if bound is None else "yes" if verdict.is_kept else "NO",
    ]


@dataclass
class Report:
    """The files that a run writes as it goes."""

    output: Path
    command: str
    minutes: float
    rate: float
    warm_up_s: float
    which: str = "woven"
    where: str = "the CPU"
    change: str = ""
    looks: list[Look] = field(default_factory=list)
    written_s: float = 0.0

    def see(self, look: Look) -> None:
        """Keep a look, on disk too."""
        self.looks.append(look)
        row = look.row()
        with open(self.output.with_suffix(".csv"), "a" if len(self.looks) > 1 else "w") as file:
            writer = csv.DictWriter(file, row, extrasaction="ignore", lineterminator="\n")
            if len(self.looks) == 1:
                writer.writeheader()
            writer.writerow(row)
        if look.at_s - self.written_s > 60:
            self.written_s = look.at_s
            with suppress(ValueError):  # too early
                notes = [f"This run was not over: {look.at_s / 60:.0f} minutes of it."]
                self.write([*notes, *look.errors], len(look.errors))

    def write(self, notes: Sequence[str], num_errors: int) -> list[Verdict]:
        """Write the table of what was seen until now."""
        verdicts = judge(self.looks, self.warm_up_s)
        recording.write(
            self.output,
            title=f"Soak: a {self.which} server under a fixed load",
            command=self.command,
            columns=(
                "figure",
                "after warm-up",
                "at the end",
                "growth an hour (95 % interval)",
                "bound",
                "kept",
            ),
            rows=[
                ["requests completed", "", str(self.looks[-1].completed), "", "", ""],
                ["errors", "", str(num_errors), "", "0", "NO" if num_errors else "yes"],
                *map(_row, verdicts),
            ],
            notes=[*notes, *self._explanation()],
        )
        return verdicts

    def _explanation(self) -> list[str]:
        return [
            f"{self.minutes:g} minutes, TP=2 on {self.where}, {self.rate:g} requests a second "
            "(Poisson): 1 to 2000 tokens, chat, n > 1, log probabilities, streams, of which a "
            "quarter is closed by the client. A canary, the same greedy request every "
            f"{CANARY_EVERY} requests, must not change its answer{self.change}.",
            f"Slopes are Theil-Sen's over samples {LOOK_S} s apart, without the first "
            f"{self.warm_up_s:.0f} s; a bound is kept if the interval's upper end is below it.",
            f"Bounds: {BYTES_PER_REQUEST} bytes a request for memory (what is no file's), one in "
            "two minutes for descriptors, threads and files; in less than "
            f"{SHORT_S // 60} minutes at least {LEAST_BYTES >> 20} MiB and {LEAST_COUNT} over the "
            "run. glibc returns freed memory at once "
            f"({', '.join(f'{name}={value}' for name, value in ENVIRONMENT.items())}).",
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Hold a woven server under a fixed load.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="a server that does not weave")
    parser.add_argument("--gpus", action="store_true", help="TP=2 on two GPUs, in bfloat16")
    parser.add_argument("--flags", default="", help="more flags of the woven server")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:] if arguments is None else arguments
    report = Report(
        options.output,
        shlex.join(["python", "tests/soak.py", *words]),
        options.minutes,
        options.rate,
        warm_up_s=max(15.0, 60 * options.minutes / 6),
        which="stock" if options.stock else "woven",
        where="two GPUs" if options.gpus else "the CPU",
        change=f" (log probabilities, by {CANARY_TOLERANCE})" if options.gpus else "",
    )
    recording.commit()  # that of now, not of the end
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "llama"), on_gpus=options.gpus)
        with Server(model, **server_of(options)) as server:
            done = asyncio.run(
                soak(
                    server,
                    Mix(options.seed),
                    options.rate,
                    60 * options.minutes,
                    report.see,
                    is_exact=not options.gpus,
                )
            )
            notes = [*_what_was_woven(server.tokenweave()), *done.errors]
    notes.append(f"{done.left} clients left early.")
    verdicts = report.write(notes, len(done.errors))
    for verdict in verdicts:
        print(*_row(verdict), sep=" | ")
    print(*notes, f"{done.completed} requests completed.", sep="\n")
    return 1 if done.errors or not all(verdict.is_kept for verdict in verdicts) else 0


def _what_was_woven(state: dict[str, Any] | None) -> list[str]:
    if state is None:
        return []
    batches, cuts = state["batches"], state["cuts"]
    return [
        f"{batches['prefill']['weave']} prefill and {batches['decode']['weave']} decode batches "
        f"were woven, {cuts['inside']} cut inside a request, {cuts['between']} between two; "
        f"fallbacks: {state['fallbacks'] or 'none'}."
    ]


if __name__ == "__main__":
    raise SystemExit(main())
