"""What attention in the weave's graphs is given, against SGLang's own sources, without a GPU."""

import ast
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from server import VERSIONS
from sglang_sources import folder, named, run, statements

from sglang_tokenweave import captured_attention, refusals, seams
from sglang_tokenweave.split import Requests

SLOTS, MAX_CONTEXT = 5, 16
# Three requests: one new, one with a prefix, one token behind a long one.
LENGTHS, PREFIXES = (3, 2, 1), (0, 4, 9)
REQUESTS = Requests(slice(0, 3), LENGTHS, PREFIXES)
POOL_ROWS = (2, 0, 3)
ATTENTION = "sglang/srt/layers/attention/"
FLASHINFER = ATTENTION + "flashinfer_backend.py"


def batch():
    """Return a half's static batch, filled with the requests; unused slots hold leftovers."""
    pad = [0] * (SLOTS - len(LENGTHS))
    ends = list(REQUESTS.ends)
    return SimpleNamespace(
        extend_num_tokens=8,
        extend_seq_lens=torch.tensor([*LENGTHS, *pad]),
        extend_prefix_lens=torch.tensor([*PREFIXES, *pad]),
        seq_lens=torch.tensor([*ends, *pad]),
        req_pool_indices=torch.tensor([*POOL_ROWS, 1, 1]),
        _attn_output=torch.zeros(8, 12),
    )


class Kernel:
    """SGLang's kernel that lists KV slots, one request a block, as its source says."""

    def __getitem__(self, grid):
        (blocks,) = grid

        def launch(table, rows, counts, starts, kv_start, listed, stride):
            assert kv_start is None
            assert stride == table.stride(0)
            for index in range(blocks):
                begin, count = int(starts[index]), int(counts[index])
                listed[begin : begin + count] = table[rows[index], :count]

        return launch


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(seams, "kv_indices_kernel", Kernel)
    return torch.arange(4 * MAX_CONTEXT).view(4, MAX_CONTEXT) + 100


def listed(table, counts):
    pairs = zip(POOL_ROWS, counts, strict=True)
    return torch.cat([table[row, :count] for row, count in pairs])


@pytest.mark.parametrize("version", VERSIONS)
def test_triton_gets_the_metadata_of_prompts_outside_of_graphs(version, table, monkeypatch):
    source = statements(version, ATTENTION + "triton_backend.py")
    metadata = run(named(source, "ForwardMetadata"))
    module = SimpleNamespace(ForwardMetadata=metadata)
    monkeypatch.setattr(captured_attention, "_module_of", lambda backend: module)
    own = captured_attention._Triton(table, SLOTS, MAX_CONTEXT, SimpleNamespace())
    half = batch()
    own.begin(half, REQUESTS)
    own.refill(half)

    found = own.backend.forward_metadata
    assert found.max_extend_len == half.extend_num_tokens  # no request of the half is longer
    assert found.qo_indptr.tolist() == [0, 3, 5, 6, 6, 6]
    assert found.kv_indptr.tolist() == [0, 0, 4, 13, 13, 13]
    assert torch.equal(found.kv_indices[:13], listed(table, PREFIXES))
    given = {"max_extend_len", "qo_indptr", "kv_indptr", "kv_indices"}
    others = [field.name for field in fields(metadata) if field.name not in given]
    assert all(getattr(found, name) is None for name in others)


class Wrapper:
    """flashinfer's wrapper for graphs, as far as it is called."""

    def __init__(self, workspace, layout, **buffers):
        self.buffers, self.plans = buffers, []

    def plan(self, **arguments):
        self.plans.append(arguments)
        self.buffers["paged_kv_indptr_buf"].copy_(arguments["paged_kv_indptr"])

    def run(self, q, cache, *, out, **scales):
        return out


@pytest.mark.parametrize("version", VERSIONS)
def test_flashinfer_plans_on_the_host_and_lists_the_keys_in_the_graph(version, table, monkeypatch):
    metadata = run(named(statements(version, FLASHINFER), "PrefillMetadata"))
    module = SimpleNamespace(PrefillMetadata=metadata, BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setattr(captured_attention, "_module_of", lambda backend: module)
    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    updater = SimpleNamespace(
        num_qo_heads=3, num_kv_heads=1, head_dim=4, q_data_type="bf16", data_type="bf16"
    )
    backend = SimpleNamespace(
        num_wrappers=1,
        prefill_uses_dequant_workspace=False,
        prefill_backend="fa2",
        max_context_len=MAX_CONTEXT,
        indices_updater_prefill=updater,
    )
    own = captured_attention._FlashInfer(torch.zeros(1), table, SLOTS, 64, backend)
    half = batch()
    own.begin(half, REQUESTS)
    own.refill(half)

    first, plan = own._wrapper.plans
    assert first["qo_indptr"].tolist() == [0, *SLOTS * [64]]
    assert plan["qo_indptr"].tolist() == [0, 3, 5, 6, 6, 6]
    assert plan["paged_kv_indptr"].tolist() == [0, 3, 9, 19, 19, 19]
    assert all(not value.is_cuda for value in plan.values() if torch.is_tensor(value))
    keys = own._wrapper.buffers["paged_kv_indices_buf"]
    assert torch.equal(keys[:19].long(), listed(table, REQUESTS.ends))
    found = own.backend.forward_metadata
    assert (found.use_ragged, found.extend_no_prefix) == (False, False)
    out = found.prefill_wrappers[0].run(None, None)
    assert out.shape == (8, 3, 4)
    assert out.data_ptr() == half._attn_output.data_ptr()


@pytest.mark.parametrize("version", VERSIONS)
def test_sglang_has_what_is_taken_of_its_attention(version):
    for place in ("attention", "kvcache"):
        path = f"sglang/kernels/ops/{place}/kv_indices.py"
        if (folder(version) / path).exists():
            break
    kernel = named(statements(version, path), "create_flashinfer_kv_indices_triton")
    names = [each.arg.removesuffix("_ptr") for each in kernel.args.args]
    wanted = ["req_to_token", "req_pool_indices", "page_kernel_lens", "kv_indptr"]
    wanted += ["kv_start_idx", "kv_indices", "req_to_token_ptr_stride"]
    assert names[: len(wanted)] == wanted
    assert len(names) - len(wanted) == len(kernel.args.defaults)  # the others may be left out
    flashinfer = ast.unparse(ast.Module([*statements(version, FLASHINFER)], []))
    for name in ("prefill_backend", "num_wrappers", "max_context_len", "indices_updater_prefill"):
        assert f"self.{name} = " in flashinfer
    for name in ("num_qo_heads", "num_kv_heads", "head_dim", "q_data_type", "data_type"):
        assert f"self.{name} = " in flashinfer
    hybrid = named(statements(version, ATTENTION + "hybrid_attn_backend.py"), "HybridAttnBackend")
    assert "self.prefill_backend = prefill_backend" in ast.unparse(hybrid)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 4, 128), (16, 16, 64), (8, 1, 256)])
def test_the_workspace_is_what_sglang_reckons_for_its_own_graphs(version, heads, kv_heads, dim):
    backend = named(statements(version, FLASHINFER), "FlashInferAttnBackend")
    function = named(backend.body, "_full_cg_prefill_workspace_bytes")
    function.decorator_list = []
    properties = SimpleNamespace(multi_processor_count=132)
    cuda = SimpleNamespace(get_device_properties=lambda device: properties)
    torch_like = SimpleNamespace(cuda=cuda)
    theirs = run(function, torch=torch_like, FULL_CG_PREFILL_WORKSPACE_MARGIN=1)
    needed = theirs(64, 8192, num_qo_heads=heads, num_kv_heads=kv_heads, head_dim=dim, device=None)
    ours = captured_attention.workspace_bytes(
        64, 8192, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, num_sms=132
    )
    assert needed <= ours <= 1.2 * needed


def test_caches_whose_slots_are_translated_are_refused():
    for backend in (
        SimpleNamespace(_translate_kv_loc=lambda loc: loc),
        SimpleNamespace(kv_index_translator=SimpleNamespace(is_translating=True)),
    ):
        with pytest.raises(ValueError, match="slots are translated"):
            captured_attention._Triton(torch.zeros(1, 1), SLOTS, MAX_CONTEXT, backend)


@pytest.mark.parametrize(
    ("backend", "has_windows", "reason"),
    [
        ("fa3", True, None),
        ("triton", False, None),
        ("flashinfer", True, "flashinfer is not captured with a model with sliding windows"),
        ("trtllm_mha", False, "trtllm_mha is not captured with this model; captured: fa3, fl"),
    ],
)
def test_which_backends_a_graph_may_hold(backend, has_windows, reason):
    found = refusals.graph_reason(backend, has_windows=has_windows)
    assert found == reason or reason in found


def test_of_two_backends_the_one_of_prompts_is_captured():
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    # flashinfer's attribute of this name says which kernels it uses.
    prompts = SimpleNamespace(num_splits=0, prefill_backend="fa2")
    both = HybridAttnBackend.__new__(HybridAttnBackend)
    both.prefill_backend, both.decode_backend = prompts, SimpleNamespace()
    for backend in (both, prompts):
        runner = SimpleNamespace(_get_attention_backend=lambda backend=backend: backend)
        assert seams.captured_attention_backend(runner) is prompts
    assert prompts.num_splits == 1
