"""The woven forward in CUDA graphs, in a real SGLang: ranks emulated on one GPU, and on two."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from server import Server

from benchmarks import forward_timer
from sglang_tokenweave.plan import Kind, Mode
from sglang_tokenweave.tuning.table import OFF, Bucket, Candidate, Measurement
from sglang_tokenweave.tuning.text import read_file, to_text

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
SIZES = (128, 256, 512, 1024, 2048)
FLAGS = (
    *("--device", "cuda", "--dtype", "bfloat16", "--attention-backend", "fa3"),
    *("--max-total-tokens", "65536", "--chunked-prefill-size", str(SIZES[-1])),
    *("--mem-fraction-static", "0.5", "--cuda-graph-bs-decode", "1", "2", "4", "8", "16"),
    *("--cuda-graph-bs-prefill", *map(str, SIZES)),
)
WEAVE = ("--tokenweave-transport", "peer", "--tokenweave-min-tokens", "200")
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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from sglang_tokenweave.tiny_model import make_tiny_model

    return make_tiny_model("llama", tmp_path_factory.mktemp("model") / "llama", "bfloat16", **MODEL)


def on_two_gpus(*values):
    too_few = torch.cuda.device_count() < 2
    marks = [pytest.mark.multi_gpu, pytest.mark.skipif(too_few, reason="needs two CUDA devices")]
    return pytest.param(*values, marks=marks, id="two GPUs")


@pytest.fixture(scope="module", params=[pytest.param(1, id="emulated"), on_two_gpus(2)])
def tp(request):
    return request.param


@pytest.fixture(scope="module")
def emulation(tp, tmp_path_factory):
    """Return folders that make SGLang load the emulated transport as a plugin, where it must."""
    if tp > 1:
        return []
    folder = tmp_path_factory.mktemp("plugin")
    forward_timer.folder(folder, "emulation", "benchmarks.forward_timer:emulate")
    return [folder, ROOT]


def server(model, tp, launcher, flags=(), pythonpath=()):
    # The harness' own are those of a server on a CPU.
    environment = {"SGLANG_USE_CPU_ENGINE": "0", "SGLANG_NCCL_SO_PATH": ""}
    return Server(
        model,
        tp=tp,
        flags=(*FLAGS, *flags),
        launcher=launcher,
        pythonpath=pythonpath,
        environment=environment,
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


@pytest.fixture(scope="module")
def stock(model, tp):
    with server(model, tp, "stock") as running:
        return ask_all(running), decode_all(running)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def reference(in_float32):
    found = [of_tokens(in_float32, ids) for ids in prompts()]
    return [*found, in_float32(prompt_with_prefix())[-1, :NEXT].tolist()]


def rms(found, reference):
    differences = [
        a - b for rows in zip(found, reference, strict=True) for a, b in zip(*rows, strict=True)
    ]
    assert all(map(math.isfinite, differences))
    return math.sqrt(sum(each**2 for each in differences) / len(differences))


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


def test_woven_graphs_are_as_exact_as_stock(model, tp, emulation, stock, reference):
    found = woven(model, tp, emulation, WEAVE)
    assert is_as_exact(found, stock, reference)


@pytest.mark.parametrize("backend", ["flashinfer", "triton"])
def test_other_attention_in_graphs_is_as_exact_as_stock(model, tp, emulation, reference, backend):
    flags = ("--attention-backend", backend)
    with server(model, tp, "stock", flags) as running:
        stock = ask_all(running)
    found = woven(model, tp, emulation, (*WEAVE, *flags))
    assert is_as_exact(found, (stock,), reference)


def test_copy_engines_in_graphs_are_as_exact_as_stock(model, tp, emulation, stock, reference):
    if tp == 1:
        pytest.skip("emulated ranks have no copy engines")
    found = woven(model, tp, emulation, COPY)
    assert is_as_exact(found, stock, reference)


def test_the_fused_op_runs_in_stock_graphs(model, tp, emulation, stock, reference):
    with server(model, tp, "tokenweave", (*FUSE, "--tokenweave-strict"), emulation) as running:
        found = ask_all(running)
        state, log = running.tokenweave(), running.log()
    assert "cuda graph: True" in log
    assert state["batches"]["prefill"]["fuse"] >= len(PROMPTS)
    assert state["batches"]["decode"]["fuse"] > 0
    assert is_as_exact(found, stock, reference)


def test_the_one_shot_op_runs_in_stock_graphs(model, tp, stock, in_float32, tmp_path):
    if tp == 1:
        pytest.skip("emulated ranks have no one-shot op")
    path = tmp_path / "table.yaml"
    flags = ("--tokenweave-strict", "--tokenweave-table", str(path), "--max-running-requests", "16")
    tuned = (*flags, "--tokenweave-tune", "force", "--tokenweave-tune-seconds", "10")
    with server(model, tp, "tokenweave", tuned):
        table, _ = read_file(path)
    # As somebody may write it: all small decodes by the one-shot op.
    path.write_text(to_text(replace(table, buckets=tuple(map(by_one_shot, (1, 16))))))
    with server(model, tp, "tokenweave", flags) as running:
        found = decode_all(running)
        state = running.tokenweave()
    assert state["notes"] == []
    assert state["batches"]["decode"]["fuse"] >= DECODED // 2
    # As below.
    assert error_of_decoded(found, in_float32) <= 1.1 * error_of_decoded(stock[1], in_float32)


def by_one_shot(tokens):
    """Return a bucket of decodes that chooses the one-shot op."""
    candidates = (OFF, Candidate(Kind.FUSE))
    times = tuple(Measurement(each, us=1.0, spread_us=0.0, rounds=5) for each in candidates)
    return Bucket(Mode.DECODE, tokens, candidates[1], times)


def test_decodes_woven_in_stock_graphs_are_as_exact_as_stock(
    model, tp, emulation, stock, in_float32
):
    with server(model, tp, "tokenweave", (*DECODE, "--tokenweave-strict"), emulation) as running:
        found = decode_all(running)
        state = running.tokenweave()
    assert state["fallbacks"] == {}
    assert state["batches"]["decode"]["weave"] >= DECODED // 2  # those of one request are not
    # Of 768 tokens, and different ones: a tenth is left to chance.
    assert error_of_decoded(found, in_float32) <= 1.1 * error_of_decoded(stock[1], in_float32)
