"""The woven forward in CUDA graphs, in a real SGLang: ranks emulated on one GPU, and on several."""

from dataclasses import replace

import gpus
import pytest
import torch
import woven_servers
from gpu_servers import MODEL, WEAVE
from woven_servers import (
    COPY,
    DECODE,
    DECODED,
    FUSE,
    PROMPTS,
    ask_all,
    decode_all,
    error_of_decoded,
    is_as_exact,
    server,
    woven,
)

from sglang_tokenweave.plan import Kind, Mode
from sglang_tokenweave.tuning.table import OFF, Bucket, Candidate, Measurement
from sglang_tokenweave.tuning.text import read_file, to_text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from sglang_tokenweave.tiny_model import make_tiny_model

    return make_tiny_model("llama", tmp_path_factory.mktemp("model") / "llama", "bfloat16", **MODEL)


@pytest.fixture(
    scope="module", params=[pytest.param(1, id="emulated"), gpus.on(2, 2), gpus.on(4, 4)]
)
def tp(request):
    return request.param


@pytest.fixture(scope="module")
def emulation(tp, tmp_path_factory):
    return [] if tp > 1 else woven_servers.emulation(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="module")
def stock(model, tp):
    with server(model, tp, "stock") as running:
        return ask_all(running), decode_all(running)


@pytest.fixture(scope="module")
def in_float32(model):
    return woven_servers.in_float32(model)


@pytest.fixture(scope="module")
def reference(in_float32):
    return woven_servers.reference(in_float32)


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


def test_a_deep_model_is_tuned_by_few_of_its_layers(tp, emulation, tmp_path):
    """Each candidate has to give stock's logits at once, in a graph captured for it and replayed.

    Large prompts: attention of a capture that is not over takes long enough to disturb a replay.
    """
    from sglang_tokenweave.tiny_model import make_tiny_model

    deep = MODEL | {"num_hidden_layers": 12, "num_attention_heads": 32}
    folder = make_tiny_model("llama", tmp_path / "deep", "bfloat16", **deep)
    flags = ("--tokenweave-strict", "--max-running-requests", "16", "--tokenweave-tune", "force")
    sizes = ("--chunked-prefill-size", "8192", "--cuda-graph-bs-prefill", "512", "2048", "8192")
    times = ("--tokenweave-tune-seconds", "15", "--tokenweave-table", str(tmp_path / "table.yaml"))
    with server(folder, tp, "tokenweave", (*flags, *sizes, *times), emulation) as running:
        state = running.tokenweave()
    assert (state["notes"], state["tuned"]["source"]) == ([], "measured")
    table, _ = read_file(tmp_path / "table.yaml")
    assert {Kind.OFF, Kind.FUSE, Kind.WEAVE} <= {
        each.candidate.kind for bucket in table.buckets for each in bucket.measured
    }


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
