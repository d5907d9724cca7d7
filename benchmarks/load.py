"""What load a server is put under, and what came of it: pure, but for the files of a client."""

import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTPUT_TOKENS = 128
# Mean tokens of a conversation's first prompt and answer in ShareGPT (arXiv 2309.06180, figure 11).
# Only the means are published: lengths are drawn from exponential distributions of these means.
SHAREGPT_MEANS = (161.31, 337.99)
_LONGEST = 1024  # of each drawn length, as benchmarks of ShareGPT cut it
_FIXED = {f"in{tokens}-out{OUTPUT_TOKENS}": tokens for tokens in (512, 1024, 2048)}
SHAREGPT = "sharegpt_like"
WORKLOADS = (*_FIXED, SHAREGPT)
WORD = " count"  # a word that most vocabularies hold


class LoadError(Exception):
    """A client did not do its work; the text says which and why."""


@dataclass(frozen=True)
class Target:
    """The latencies that a request must keep to count as good, in milliseconds."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class Outcome:
    """What a client saw of one server under one load."""

    input_tokens: float  # of a request, on average
    latency_us: float  # of a request, median
    ttft_us: float
    tpot_us: float
    requests_per_s: float
    tokens_per_s: float  # input and output
    goodput_requests_per_s: float


def client_arguments(
    workload: str, prompts: int, folder: Path, seed: int, word: str = WORD
) -> list[str]:
    """Return the arguments of `sglang.benchmark.serving` that make a workload's requests.

    Args:
        word: that the model's tokenizer makes one token of.

    Raises:
        ValueError: an unknown workload.
    """
    count = ["--num-prompts", str(prompts)]
    if workload in _FIXED:
        return [
            *("--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1"),
            *("--random-input-len", str(_FIXED[workload])),
            *("--random-output-len", str(OUTPUT_TOKENS), *count),
        ]
    if workload != SHAREGPT:
        raise ValueError(f"workload {workload!r}: known are {', '.join(WORKLOADS)}")
    path = folder / "conversations.jsonl"
    write_conversations(path, lengths(prompts, seed), word)
    return ["--dataset-name", "custom", "--dataset-path", str(path), *count]


def lengths(count: int, seed: int) -> list[tuple[int, int]]:
    """Draw tokens of prompts and answers with ShareGPT's means, from 4 to 1024 each."""
    draw = random.Random(seed)
    return [
        (_clip(draw.expovariate(1 / prompt)), _clip(draw.expovariate(1 / answer)))
        for prompt, answer in [SHAREGPT_MEANS] * count
    ]


def write_conversations(path: Path, drawn: Sequence[tuple[int, int]], word: str = WORD) -> None:
    """Write conversations of about so many tokens, in the form that SGLang's client reads.

    Each prompt begins with a number of its own, so that no cache serves it.
    """
    with path.open("w") as file:
        for number, (prompt, answer) in enumerate(drawn):
            turns = [f"w{number}{word * (prompt - 1)}", word * answer]
            file.write(json.dumps({"conversations": [{"value": turn} for turn in turns]}) + "\n")


def outcome(record: Mapping[str, Any], prompts: int, target: Target) -> Outcome:
    """Summarise what SGLang's client wrote with --output-details.

    Raises:
        LoadError: requests failed, or some are missing.
    """
    failed = [error for error in record["errors"] if error]
    if failed or record["completed"] != prompts:
        why = f"; the first: {str(failed[0]).strip()[-300:]}" if failed else ""
        raise LoadError(f"{record['completed']} of {prompts} requests were answered{why}")
    requests = list(zip(record["ttfts"], record["itls"], record["output_lens"], strict=True))
    good = sum(_is_good(*request, target) for request in requests)
    return Outcome(
        input_tokens=record["total_input_tokens"] / prompts,
        latency_us=1e3 * record["median_e2e_latency_ms"],
        ttft_us=1e3 * record["median_ttft_ms"],
        tpot_us=1e3 * record["median_tpot_ms"],
        requests_per_s=record["request_throughput"],
        tokens_per_s=record["total_throughput"],
        goodput_requests_per_s=good / record["duration"],
    )


def middle(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the median of each number over the rounds."""
    return Outcome(
        *(statistics.median(values) for values in zip(*map(_numbers, outcomes), strict=True))
    )


def rate_name(rate: float) -> str:
    """Return a request rate for the name of a row's shape."""
    return "all_at_once" if math.isinf(rate) else f"{rate:g}_per_s"


def _numbers(each: Outcome) -> tuple[float, ...]:
    return tuple(vars(each).values())


def _is_good(ttft_s: float, itls_s: Sequence[float], tokens: int, target: Target) -> bool:
    tpot_ms = 1e3 * sum(itls_s) / max(1, tokens - 1)
    return 1e3 * ttft_s <= target.ttft_ms and tpot_ms <= target.tpot_ms


def _clip(length: float) -> int:
    return min(max(4, round(length)), _LONGEST)
