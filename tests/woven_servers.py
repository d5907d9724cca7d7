"""Servers whose weave runs in CUDA graphs, what they are asked, and how exact their answers are."""

import math
import random
from pathlib import Path

import torch
from gpu_servers import ENVIRONMENT, WEAVE
from server import Server

from benchmarks import forward_timer

ROOT = Path(__file__).resolve().parents[1]

SIZES = (128, 256, 512, 1024, 2048)
FLAGS = (
    *("--device", "cuda", "--dtype", "bfloat16", "--attention-backend", "fa3"),
    *("--max-total-tokens", "65536", "--chunked-prefill-size", str(SIZES[-1])),
    *("--mem-fraction-static", "0.5", "--cuda-graph-bs-decode", "1", "2", "4", "8", "16"),
    *("--cuda-graph-bs-prefill", *map(str, SIZES)),
)
COPY = (*WEAVE, "--tokenweave-ctas", "0")
FUSE = (
    *("--tokenweave-transport", "peer", "--tokenweave-min-tokens", "100000"),
    *("--tokenweave-fuse-min-tokens", "1"),
)
# 16 requests that decode together, so in graphs of two halves; prefills run stock.
DECODE = (
    *("--tokenweave-transport", "peer", "--tokenweave-min-tokens", "100000"),
    *("--tokenweave-decode-min-tokens", "2"),
)
DECODED = 48  # tokens of each
# The prompts whose log probabilities are compared: one inside a size, one that fills it, the
# fewest tokens of a size, several requests, more than one chunk.
PROMPTS = ([300], [1024], [257], [7, 400, 1, 90, 333], [2500])
PREFIX = 600
NEXT = 100  # tokens, of which the next one's log probability is asked


def emulation(folder):
    """Return folders that make SGLang load the emulated transport as a plugin, on one GPU."""
    forward_timer.folder(folder, "emulation", "benchmarks.forward_timer:emulate")
    return [folder, ROOT]


def server(model, tp, launcher, flags=(), pythonpath=()):
    return Server(
        model,
        tp=tp,
        flags=(*FLAGS, *flags),
        launcher=launcher,
        pythonpath=pythonpath,
        environment=ENVIRONMENT,
    )


def token_ids(seed, count):
    draw = random.Random(seed)
    return [draw.randrange(3, 1000) for _ in range(count)]


def prompts():
    lengths = [length for batch in PROMPTS for length in batch]
    return [token_ids(seed, length) for seed, length in enumerate(lengths)]


def ask_all(server):
    """Return log probabilities: of each prompt's tokens but the first, then behind a prefix."""
    found, rest = [], prompts()
    for batch in PROMPTS:
        ids, rest = rest[: len(batch)], rest[len(batch) :]
        answers = ask(server, ids, return_logprob=True, logprob_start_len=0)
        metas = [answer["meta_info"] for answer in answers]
        found += [[entry[0] for entry in meta["input_token_logprobs"]][1:] for meta in metas]
    return [*found, behind_prefix(server)]


def behind_prefix(server):
    """Return the next token's log probabilities where the cache holds the prompt's beginning."""
    ids = prompt_with_prefix()
    ask(server, [ids[:PREFIX]])
    options = {"return_logprob": True, "token_ids_logprob": list(range(NEXT))}
    (answer,) = ask(server, [ids], **options)
    assert answer["meta_info"]["cached_tokens"] >= PREFIX - 1
    return [entry[0] for entry in answer["meta_info"]["output_token_ids_logprobs"][0]]


def decode_all(server):
    """Return 16 prompts with what was decoded behind each, and the log probabilities of that."""
    ids = [token_ids(seed, 20 + seed) for seed in range(16)]
    answers = ask(server, ids, max_new_tokens=DECODED, return_logprob=True)
    decoded = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    texts = [one + [entry[1] for entry in own] for one, own in zip(ids, decoded, strict=True)]
    return texts, [[entry[0] for entry in own] for own in decoded]


def ask(server, ids, max_new_tokens=4, **options):
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
    return server.generate(input_ids=ids, sampling_params=sampling, **options)


def prompt_with_prefix():
    return token_ids(99, PREFIX + 700)


def in_float32(model):
    """Return the same weights as a function of token ids to the log probabilities after each."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).cuda()

    def logprobs(ids):
        with torch.no_grad():
            return network(torch.tensor([ids], device="cuda")).logits[0].log_softmax(-1)

    return logprobs


def of_tokens(logprobs, ids):
    """Return the log probabilities of all tokens but the first."""
    following = torch.tensor(ids[1:], device="cuda")[:, None]
    return logprobs(ids)[:-1].gather(-1, following)[:, 0].tolist()


def reference(logprobs):
    """Return what `ask_all` would of a server that computes in float32."""
    found = [of_tokens(logprobs, ids) for ids in prompts()]
    return [*found, logprobs(prompt_with_prefix())[-1, :NEXT].tolist()]


def differences(found, reference):
    """Return all differences of log probabilities.

    Raises:
        AssertionError: one is infinite or not a number, or the numbers of tokens are others.
    """
    pairs = [
        pair for rows in zip(found, reference, strict=True) for pair in zip(*rows, strict=True)
    ]
    wrong = [ours - theirs for ours, theirs in pairs]
    assert all(map(math.isfinite, wrong))
    return wrong


def rms(found, reference):
    wrong = differences(found, reference)
    return math.sqrt(sum(each**2 for each in wrong) / len(wrong))


def error_of_decoded(decoded, in_float32):
    """Return the error of log probabilities, each of the tokens that were decoded."""
    texts, found = decoded
    return rms(found, [of_tokens(in_float32, text)[-DECODED:] for text in texts])


def is_as_exact(found, stock, reference):
    """Whether an error against float32 is no larger than stock's.

    Both round to bfloat16 in the same places, but one: the sum over the ranks stays float32 up to
    the norm. 5 % is what a few thousand tokens leave to chance.
    """
    return rms(found, reference) <= 1.05 * rms(stock[0], reference)


def woven(model, tp, emulation, flags):
    """Return what a server that weaves answered, and check that it wove in its graphs."""
    with server(model, tp, "tokenweave", (*flags, "--tokenweave-strict"), emulation) as running:
        found = ask_all(running)
        state, log = running.tokenweave(), running.log()
    assert "TokenWeave captured 4 CUDA graphs of 256 to 2048 tokens" in log
    assert state["notes"] == []
    assert state["batches"]["prefill"]["weave"] >= len(PROMPTS)
    assert state["cuts"]["inside"] > 0
    assert state["fallbacks"] == {}
    return found
