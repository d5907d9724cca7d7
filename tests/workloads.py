"""Requests that exercise every way a batch can be cut, and the comparison of two servers' answers.

A workload is a function of a server that returns answers in a fixed order. Prompts are token ids
from a seed, so every server gets the same ones.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from server import Server

# Largest difference of two log probabilities that are the same number. Two runs of one stock server
# batch requests differently, so float32 sums run in another order: up to 1e-5 apart on these
# models. A wrong token, position or row of the KV cache is off by more than 1e-2.
LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Answer:
    """What a request returned; no log probabilities where it did not ask for them."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()  # of the prompt's tokens but the first, then of `tokens`
    margins: tuple[float, ...] = ()  # per token of `tokens`: by how much it beat the second best


def long_prompt(server: Server) -> list[Answer]:
    """One request in a batch, with the prompt's own log probabilities: a cut can only be inside."""
    return [ask(server, token_ids(seed, 480), logprob_start_len=0) for seed in (1, 2)]


def short_batch(server: Server) -> list[Answer]:
    """Many short prompts in one batch: cuts fall between requests too."""
    prompts = [token_ids(seed, 5 + seed % 17) for seed in range(100, 124)]
    return ask_all(server, prompts)


def chunked(server: Server) -> list[Answer]:
    """Prompts longer than the chunk of 512 by odd remainders."""
    return [ask(server, token_ids(n, n), logprob_start_len=0) for n in (513, 700, 1025, 1531)]


def prefix_hit(server: Server) -> list[Answer]:
    """Prompts that start with what the radix cache holds: both halves read a cached prefix."""
    prefix = token_ids(3, 300)
    first = ask(server, prefix)
    before = server.generate(input_ids=[*prefix, 5, 6, 7], sampling_params=_greedy(1))
    assert before["meta_info"]["cached_tokens"] >= len(prefix), "no prefix was in the cache"
    again = [ask(server, prefix), ask(server, [*prefix, *token_ids(4, 200)])]
    return [
        first,
        *again,
        *ask_all(server, [[*prefix, *token_ids(n, 20)] for n in range(200, 206)]),
    ]


def decode(server: Server) -> list[Answer]:
    """Twelve requests that decode together for long."""
    return ask_all(server, [token_ids(seed, 9) for seed in range(300, 312)], max_new_tokens=48)


def streamed(server: Server) -> list[Answer]:
    """A request answered in pieces."""
    pieces = list(server.stream(**greedy_request(token_ids(5, 120))))
    assert len(pieces) > 4, "the answer came in one piece"
    return [read_answer(pieces[-1])]


def several_samples(server: Server) -> list[Answer]:
    """n=3 of one prompt: the same prefix three times, answered greedily alike."""
    raw = server.generate(**greedy_request(token_ids(6, 70), sampling={"n": 3}))
    assert len(raw) == 3
    return [read_answer(one) for one in raw]


def while_decoding(server: Server) -> list[Answer]:
    """A long prompt that comes while others decode: with --enable-mixed-chunk, one batch."""
    pool = ThreadPoolExecutor(5)
    decoding = threading.Barrier(5, timeout=60)

    def decode_long(seed: int) -> Answer:
        last: dict[str, Any] = {}
        for index, piece in enumerate(server.stream(**greedy_request(token_ids(seed, 12), 64))):
            last = piece
            if index == 2:
                decoding.wait()
        return read_answer(last)

    with pool:
        streams = [pool.submit(decode_long, seed) for seed in range(400, 404)]
        decoding.wait()
        late = ask(server, token_ids(7, 1531))
        return [late, *(stream.result() for stream in streams)]


def aborted(server: Server) -> list[Answer]:
    """Six streams of which two are disconnected and two aborted; the rest must be right."""
    started = threading.Barrier(6, timeout=60)

    def run(index: int) -> Answer | None:
        request = greedy_request(token_ids(500 + index, 150), 40 if index < 2 else 1500)
        stream = server.stream(**request, rid=f"aborted-{index}-{time.monotonic_ns()}")
        piece = next(stream)
        started.wait()
        if index in (2, 3):
            stream.close()
            return None
        if index in (4, 5):
            server.request("/abort_request", rid=piece["meta_info"]["id"])
        for piece in stream:
            last = piece
        if index in (4, 5):
            assert last["meta_info"]["finish_reason"]["type"] == "abort"
            return None
        return read_answer(last)

    with ThreadPoolExecutor(6) as pool:
        survivors = [answer for answer in pool.map(run, range(6)) if answer is not None]
    return [*survivors, ask(server, token_ids(8, 90))]


def concurrent(server: Server) -> list[Answer]:
    """64 requests at once, 1 to 600 tokens long, without log probabilities."""
    rng = random.Random(9)
    prompts = [token_ids(600 + index, rng.randint(1, 600)) for index in range(64)]

    def run(prompt: list[int]) -> Answer:
        raw = server.generate(input_ids=prompt, sampling_params=_greedy(16))
        return Answer(tokens=tuple(raw["output_ids"]))

    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(run, prompts))


Answers = dict[str, list[Answer]]  # by workload
WORKLOADS: dict[str, Callable[[Server], list[Answer]]] = {
    work.__name__: work
    for work in (
        long_prompt,
        short_batch,
        chunked,
        prefix_hit,
        decode,
        streamed,
        several_samples,
        while_decoding,
        aborted,
        concurrent,
    )
}


def run(server: Server, workload: str) -> list[Answer]:
    """Run a workload on an idle server with an empty cache."""
    server.flush_cache()
    return WORKLOADS[workload](server)


def assert_equal(expected: Sequence[Answer], actual: Sequence[Answer]) -> None:
    """Compare answers: the same tokens, and log probabilities within LOGPROB_TOLERANCE."""
    assert len(expected) == len(actual)
    problems = [
        f"answer {index}: {problem}"
        for index, pair in enumerate(zip(expected, actual, strict=True))
        if (problem := _difference(*pair))
    ]
    assert not problems, f"{len(problems)} of {len(expected)} differ\n" + "\n".join(problems)


def ask(server: Server, prompt: list[int], **options: Any) -> Answer:
    """Return the greedy answer to one prompt."""
    return ask_all(server, [prompt], **options)[0]


def ask_all(
    server: Server, prompts: list[list[int]], *, max_new_tokens: int = 16, **options: Any
) -> list[Answer]:
    """Return the greedy answers to prompts that arrive in one request."""
    return [
        read_answer(raw)
        for raw in server.generate(**{**greedy_request(prompts, max_new_tokens), **options})
    ]


def greedy_request(
    prompt: Any, max_new_tokens: int = 16, sampling: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the fields of a greedy request with log probabilities."""
    return {
        "input_ids": prompt,
        "sampling_params": {**_greedy(max_new_tokens), **(sampling or {})},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }


def _greedy(max_new_tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}


def token_ids(seed: int, length: int) -> list[int]:
    """Return a prompt of random tokens, the same for the same arguments."""
    rng = random.Random(seed)
    return [rng.randrange(3, 1000) for _ in range(length)]  # 0 to 2 are special


def read_answer(raw: dict[str, Any]) -> Answer:
    """Return what /generate answered, if it was asked as `greedy_request` asks."""
    info = raw["meta_info"]
    prompt = [entry[0] for entry in info.get("input_token_logprobs") or () if entry[0] is not None]
    chosen = info["output_token_logprobs"]
    best_two = info["output_top_logprobs"]
    return Answer(
        tokens=tuple(token for _, token, *_ in chosen),
        logprobs=(*prompt, *(logprob for logprob, *_ in chosen)),
        margins=tuple(first[0] - second[0] for first, second in best_two),
    )


def _difference(expected: Answer, actual: Answer) -> str | None:
    if expected.tokens != actual.tokens:
        pairs = zip(expected.tokens, actual.tokens, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(actual.tokens))
        margin = f", which won by {expected.margins[at]:.1e}" if expected.margins else ""
        return (
            f"token {at} of {len(expected.tokens)} differs, stock has "
            f"{expected.tokens[at : at + 3]}{margin}, woven {actual.tokens[at : at + 3]}"
        )
    if len(expected.logprobs) != len(actual.logprobs):
        return f"{len(expected.logprobs)} log probabilities in stock, {len(actual.logprobs)} woven"
    pairs = zip(expected.logprobs, actual.logprobs, strict=True)
    worst = max((abs(a - b) for a, b in pairs), default=0.0)
    return f"log probabilities {worst:.1e} apart" if worst > LOGPROB_TOLERANCE else None
