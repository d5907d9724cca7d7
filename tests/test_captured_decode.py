"""Decode batches cut inside SGLang's own CUDA graph, without a GPU.

The real model runs with the path that a capture takes; attention's metadata are fa3's by name.
"""

import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import workloads
from batches import make_batch
from hypothesis import given
from hypothesis import strategies as st
from server import INSTALLED, VERSIONS, WEAVE, Server, after_import
from sglang_sources import named, run, statements
from workloads import Answers

from sglang_tokenweave import captured_decode, seams
from sglang_tokenweave.split import UnsplittableError

# As if everything ran in a capture, with an attention backend that keeps no metadata: it reads them
# from the batch. Each cut is said.
CAPTURES = """
import os
from sglang_tokenweave import captured_decode, seams
seams.graph_owns_forward = lambda: True
captured_decode._backend_of = lambda backend, requests: backend
captured_decode.ATTENTION_BACKENDS = frozenset({"intel_amx", "torch_native"})
_cut = captured_decode.cut
def cut(batch, num_requests):
    os.write(1, f"captured decode: {batch.batch_size}, {num_requests}\\n".encode())
    return _cut(batch, num_requests)
captured_decode.cut = cut
"""


@cache
def metadata_class(version: str) -> Any:
    """Return fa3's metadata of a release: the class alone, as its module needs a GPU's kernels."""
    path = "sglang/srt/layers/attention/flashattention_backend.py"
    return run(named(statements(version, path), "FlashAttentionMetadata"))


def backend_of(num_requests, version=INSTALLED):
    lengths = torch.arange(num_requests, dtype=torch.int32) + 5
    metadata = metadata_class(version)(
        cache_seqlens_int32=lengths,
        cu_seqlens_q=torch.arange(num_requests + 1, dtype=torch.int32),
        cu_seqlens_k=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        page_table=torch.arange(num_requests * 8).view(num_requests, 8),
        max_seq_len_k=99,
        scheduler_metadata=torch.ones(4),
    )
    return SimpleNamespace(forward_metadata=metadata, num_splits=0, decode_num_splits=0)


@contextmanager
def current(backend):
    """Let SGLang's forward context be of this backend, and keep which ones are entered."""
    entered = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seams, "attention_backend", lambda: backend)
        patch.setattr(seams, "attention_context", lambda *of: entered.append(of))
        yield entered


@given(num_requests=st.integers(2, 40), data=st.data())
def test_the_halves_read_what_is_refilled_before_each_replay(num_requests, data):
    cut = data.draw(st.integers(1, num_requests - 1))
    backend = backend_of(num_requests)
    batch = make_batch([1] * num_requests, list(range(num_requests)), decode=True)
    with current(backend) as entered:
        parts = captured_decode.cut(batch, cut)
        for _, context in parts:
            context()

    # SGLang's refill of a replay, in place.
    whole = backend.forward_metadata
    whole.cache_seqlens_int32 += 3
    whole.page_table *= 7
    batch.input_ids += 1
    batch.out_cache_loc += 1
    bounds = [slice(0, cut), slice(cut, num_requests)]
    for (part, _), (own, of), rows in zip(parts, entered, bounds, strict=True):
        assert of is part
        metadata, count = own.forward_metadata, rows.stop - rows.start
        assert torch.equal(metadata.cache_seqlens_int32, whole.cache_seqlens_int32[rows])
        assert torch.equal(metadata.page_table, whole.page_table[rows])
        assert metadata.cu_seqlens_q.tolist() == list(range(count + 1))
        assert (metadata.max_seq_len_q, metadata.max_seq_len_k) == (1, 99)
        assert metadata.cu_seqlens_k is metadata.scheduler_metadata is None
        assert (own.num_splits, own.decode_num_splits) == (1, 1)
        assert part.batch_size == count
        for name in ("input_ids", "positions", "out_cache_loc", "seq_lens", "req_pool_indices"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[rows])
    assert (backend.num_splits, whole.scheduler_metadata is None) == (0, False)


@pytest.mark.parametrize("version", VERSIONS)
def test_metadata_of_every_release_are_understood(version):
    with current(backend_of(4, version)):
        captured_decode.cut(make_batch([1] * 4, [3] * 4, decode=True), 2)


def test_metadata_that_are_not_understood_are_named():
    backend = backend_of(4)
    backend.forward_metadata.swa_page_table = torch.zeros(4, 8)
    with (
        current(backend),
        pytest.raises(UnsplittableError, match="field swa_page_table of attention"),
    ):
        captured_decode.cut(make_batch([1] * 4, [3] * 4, decode=True), 2)


@pytest.mark.server
def test_a_decode_woven_as_captured_answers_as_stock(
    model: Callable[[str], Path], stock: Callable[..., Answers], tmp_path: Path
) -> None:
    expected = stock("llama", ("decode", "short_batch"))
    captures = after_import(tmp_path, "sglang_tokenweave.runtime", CAPTURES)
    with Server(model("llama"), flags=WEAVE, pythonpath=[captures]) as server:
        for workload in ("decode", "short_batch"):
            workloads.assert_equal(expected[workload], workloads.run(server, workload))
        state, log = server.tokenweave(), server.log()
    assert state is not None
    assert not state["fallbacks"]
    cuts = re.findall(r"captured decode: (\d+), (\d+)", log)
    assert max((int(whole), int(first)) for whole, first in cuts) == (24, 12)
    assert state["batches"]["prefill"]["weave"] == 0  # a prefill is not cut there
