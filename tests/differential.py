"""Send the same random requests to a stock and a woven server and compare all answers.

`python tests/differential.py --requests 20000 --output docs/reliability/differential.json` starts
both on the CPU (TP=2, float32) and asks them block by block, one after the other, with many
requests in flight. Before, it asks stock a block twice: so far apart are two runs of stock. With
`--first`, several runs side by side share the requests. Exit status 0: no answer differs.

A difference counts as a tie if rounding can bring it about: asked again, each alone, both servers
report log probabilities at that token with which the sampler may choose either (see `seeded`).
"""

import argparse
import asyncio
import dataclasses
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import load
import recording
import seeded
from load import Mix, Request, Sample
from server import LONG_START_S, WEAVE, Server
from workloads import LOGPROB_TOLERANCE

from sglang_tokenweave.tiny_model import make_tiny_model

FLAGS = ("--tokenweave-strict", *WEAVE)
IN_FLIGHT = 16
BLOCK = 250
MIX = Mix(
    seed=1, longest=4096, longest_usual=160, most_new_tokens=8, num_prefixes=12, is_seeded=True
)
CONTROL = dataclasses.replace(MIX, seed=2)
# A prompt of 4096 tokens, and then some.
LONGEST_CONTEXT = 8192


@dataclass(frozen=True)
class Servers:
    """The two servers, running."""

    stock: Server
    woven: Server


@contextmanager
def serve(folder: Path) -> Iterator[Servers]:
    """Start both."""
    model = make_tiny_model("llama", folder / "llama", max_position_embeddings=LONGEST_CONTEXT)
    (folder / "seeded").mkdir()
    path = seeded.pythonpath(folder / "seeded")
    with ExitStack() as stack:
        options = {"pythonpath": path, "start_deadline_s": LONG_START_S}
        yield Servers(
            stack.enter_context(Server(model, launcher="stock", **options)),
            stack.enter_context(Server(model, flags=FLAGS, **options)),
        )


@dataclass(frozen=True)
class Difference:
    """The first difference of two answers; `at` is None where no single token is to blame."""

    text: str
    sample: int = 0
    at: int | None = None
    tokens: tuple[int, int] | None = None


@dataclass
class Findings:
    """What became of the requests so far; `worst` is the largest distance of log probabilities."""

    equal: Counter[str] = field(default_factory=Counter)  # by kind; a request can be of several
    ties: Counter[str] = field(default_factory=Counter)
    different: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    texts: list[str] = field(default_factory=list)

    def count(self, outcome: Counter[str], request: Request) -> None:
        """Count a request's outcome under all its kinds."""
        outcome.update(kinds(request))


@dataclass
class Run:
    """The findings of a run: stock with itself, stock with woven, and how much was woven."""

    control: Findings = field(default_factory=Findings)
    woven: Findings = field(default_factory=Findings)
    state: dict[str, Any] = field(default_factory=dict)
    is_over: bool = False


def kinds(request: Request) -> list[str]:
    """Name what is special about a request."""
    length = len(request.payload.get("input_ids", ()))
    named = {
        "all": True,
        "greedy": request.sampling["temperature"] == 0,
        "sampled with a seed": request.sampling["temperature"] > 0,
        "streamed": request.is_streamed,
        "chat": request.is_chat,
        "n > 1": request.num_samples > 1,
        "log probabilities": request.has_logprobs,
        "longer than a chunk of 512": length > 512,
        "connection closed by the client": _leaves(request, by_rid=False),
        "aborted by its id": _leaves(request, by_rid=True),
    }
    return [name for name, holds in named.items() if holds]


def _leaves(request: Request, *, by_rid: bool) -> bool:
    return request.leave_after is not None and ("rid" in request.payload) == by_rid


def compare(request: Request, stock: Sequence[Sample], woven: Sequence[Sample]) -> list[Difference]:
    """Return what differs; of an aborted request the shorter answer must begin the longer one."""
    found = []
    for index, pair in enumerate(zip(stock, woven, strict=True)):
        found += _compare(request, index, *pair)
    return found


def _compare(request: Request, index: int, stock: Sample, woven: Sample) -> list[Difference]:
    for at, tokens in enumerate(zip(stock.tokens, woven.tokens, strict=False)):
        if tokens[0] != tokens[1]:
            text = f"token {at} is {tokens[0]} in stock, {tokens[1]} woven"
            return [Difference(text, index, at, tokens)]
    if request.leave_after is not None:
        return []  # its first tokens came, and no more
    if len(stock.tokens) != len(woven.tokens) or stock.finish != woven.finish:
        lengths = f"{len(stock.tokens)} and {len(woven.tokens)} tokens"
        return [Difference(f"{lengths}, ended by {stock.finish} and {woven.finish}", index)]
    if stock.text != woven.text:
        return [Difference(f"the text is {stock.text!r} in stock, {woven.text!r} woven", index)]
    if len(stock.logprobs) != len(woven.logprobs) or len(stock.top) != len(woven.top):
        return [Difference("more log probabilities in one than in the other", index)]
    apart = distance(stock, woven)
    return [Difference(f"log probabilities {apart:.1e} apart", index)] * (apart > LOGPROB_TOLERANCE)


def distance(stock: Sample, woven: Sample) -> float:
    """Return how far apart log probabilities are at most, those of the best tokens included."""
    flat = [
        [*sample.logprobs, *(best[0] for best in itertools.chain(*sample.top))]
        for sample in (stock, woven)
    ]
    return max((abs(a - b) for a, b in zip(*flat, strict=False)), default=0.0)


def explain(request: Request, difference: Difference, again: Sequence[list[Sample]]) -> bool:
    """Return whether rounding can bring the difference about, by the answers to `revealing`."""
    places = [difference.at]
    if request.is_chat:  # it tells no tokens: any that is open will do
        places = list(range(request.num_new_tokens))
    return any(
        _is_open(request, difference, samples[difference.sample], at)
        for samples in again
        for at in places
        if at is not None
    )


def _is_open(request: Request, difference: Difference, sample: Sample, at: int) -> bool:
    best = [
        (logprob, rank if token is None else token)
        for rank, (logprob, token) in enumerate(sample.top[at])
    ]
    sampling = dict(request.sampling)
    if request.is_chat:
        sampling["sampling_seed"] = sampling.get("seed")
    possible = seeded.choices(best, sampling, sample.prompt_tokens + at - 1, LOGPROB_TOLERANCE)
    wanted = difference.tokens
    return len(possible) > 1 and (wanted is None or possible.issuperset(wanted))


def revealing(request: Request) -> Request:
    """Return the same request, whole and with the log probabilities of the best tokens."""
    payload = {
        name: value
        for name, value in request.payload.items()
        if name not in ("rid", "stream", "stream_options")
    }
    payload |= (
        {"logprobs": True, "top_logprobs": seeded.MOST_RANKS + 1}
        if request.is_chat
        else {"return_logprob": True, "top_logprobs_num": seeded.MOST_RANKS + 1}
    )
    return Request(request.path, payload)


async def answers(server: Server, requests: Sequence[Request]) -> list[list[Sample] | str]:
    """Ask for all, `IN_FLIGHT` at once; an error stands as its text."""
    limit = asyncio.Semaphore(IN_FLIGHT)

    async def answer(session: Any, request: Request) -> list[Sample] | str:
        async with limit:
            try:
                return await load.ask(session, request)
            except Exception as error:  # noqa: BLE001 - whatever it was, it is told
                return f"{type(error).__name__}: {error}"

    async with load.open_session(server.url) as session:
        return await asyncio.gather(*(answer(session, request) for request in requests))


def compare_block(
    findings: Findings,
    numbers: range,
    mix: Mix,
    first: Server,
    second: Server,
) -> None:
    """Ask two servers for a block, one after the other, and add what was found.

    Of the requests that are aborted, one server does it to the even ones, the other to the odd.
    """
    requests = [load.draw(mix, number) for number in numbers]
    both = []
    for parity, server in enumerate((first, second)):
        asked = [
            request if number % 2 == parity else _whole(request)
            for number, request in zip(numbers, requests, strict=True)
        ]
        both.append(asyncio.run(answers(server, asked)))
    for number, request, *pair in zip(numbers, requests, *both, strict=True):
        problem = _judge(findings, request, pair, (first, second))
        if problem:
            findings.texts.append(f"request {number}: {problem}")


def _whole(request: Request) -> Request:
    """Return the request without its abort."""
    payload = {name: value for name, value in request.payload.items() if name != "rid"}
    return Request(request.path, payload)


def _judge(
    findings: Findings, request: Request, pair: Sequence[Any], servers: Sequence[Server]
) -> str | None:
    errors = [each for each in pair if isinstance(each, str)]
    if errors:
        findings.count(findings.different, request)
        return f"an error: {errors[0]}"
    found = compare(request, *pair)
    if not found:
        findings.count(findings.equal, request)
        if request.leave_after is None:
            findings.worst = max(findings.worst, *map(distance, *pair))
        return None
    again = [asyncio.run(answers(server, [revealing(request)]))[0] for server in servers]
    is_tie = not any(isinstance(each, str) for each in again) and all(
        explain(request, difference, again) for difference in found
    )
    findings.count(findings.ties if is_tie else findings.different, request)
    return f"{'tie' if is_tie else 'DIFFERENT'}: {'; '.join(each.text for each in found)}"


def compare_all(
    servers: Servers, wanted: range, controls: range, see: Callable[[Run], None]
) -> Run:
    """Compare stock with itself, then with woven, block by block; call `see` after each."""
    run = Run()
    for numbers in _blocks(controls):
        compare_block(run.control, numbers, CONTROL, servers.stock, servers.stock)
    for numbers in _blocks(wanted):
        compare_block(run.woven, numbers, MIX, servers.stock, servers.woven)
        run.state = servers.woven.tokenweave() or {}
        run.is_over = numbers.stop == wanted.stop
        see(run)
    return run


def _blocks(numbers: range) -> Iterator[range]:
    for start in range(numbers.start, numbers.stop, BLOCK):
        yield range(start, min(start + BLOCK, numbers.stop))


def write(output: Path, command: str, run: Run) -> None:
    """Write the table of what was compared until now."""
    findings = run.woven
    rows = [_row(kind, findings, kind) for kind in (findings.equal + findings.different)]
    recording.write(
        output,
        title="The same requests to a stock and a woven server",
        command=command,
        columns=("requests", "compared", "equal", "equal but for a tie", "different"),
        rows=[*rows, _row("stock against itself", run.control, "all")],
        notes=[*_explanation(run), *(text for text in findings.texts if "DIFFERENT" in text)][:40],
    )


def _row(name: str, findings: Findings, kind: str) -> list[Any]:
    counts = [outcome[kind] for outcome in (findings.equal, findings.ties, findings.different)]
    return [name, sum(counts), *counts]


def _explanation(run: Run) -> list[str]:
    batches, cuts = run.state["batches"], run.state["cuts"]
    return [
        *([] if run.is_over else ["The run was not over: what was compared until then."]),
        f"Tiny llama in float32, TP=2 on the CPU, {IN_FLIGHT} requests in flight, 1 to "
        f"{MIX.longest} tokens, half with one of {MIX.num_prefixes} shared prefixes. Equal: "
        "tokens, text, finish reasons, and log probabilities (those of the best two as well) "
        f"within {LOGPROB_TOLERANCE:g}; of an aborted request: what came begins the whole answer.",
        f"The largest distance of log probabilities was {run.woven.worst:.1e}; between two runs of "
        f"stock it was {run.control.worst:.1e}.",
        "A tie: within that tolerance the sampler may choose either token, by the log "
        "probabilities that each server, asked again, reports at the place.",
        "Seeds: SGLang takes them only in its mode for deterministic inference, which does not "
        "weave; the tests switch its seeded sampler on without it, on both servers.",
        f"On the woven server {batches['prefill']['weave']} prefill and "
        f"{batches['decode']['weave']} decode batches were woven ({cuts['inside']} cut inside a "
        f"request, {cuts['between']} between two), {batches['prefill']['off']} and "
        f"{batches['decode']['off']} were too small; "
        f"fallbacks: {run.state['fallbacks'] or 'none'}.",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Compare a stock and a woven server.")
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--controls", type=int, default=500, help="stock against itself")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python tests/differential.py", *words])
    recording.commit()  # that of now, not of the end
    told: set[str] = set()

    def see(run: Run) -> None:
        write(options.output, command, run)
        for text in [*run.control.texts, *run.woven.texts]:
            if text not in told:
                print(text)
                told.add(text)
        print(_row("all", run.woven, "all"), flush=True)

    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as servers:
        wanted, controls = (
            range(options.first, options.first + count)
            for count in (options.requests, options.controls)
        )
        run = compare_all(servers, wanted, controls, see)
    return 1 if run.woven.different["all"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
