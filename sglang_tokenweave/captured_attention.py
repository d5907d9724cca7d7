"""Attention inside the CUDA graphs of the weave, for each of SGLang's backends that can be there.

A captured kernel reads what differs between two batches from memory that stays. fa3 and triton find
all of that on the device, so it is refilled inside the graph. flashinfer also divides the work on
the host, before each launch.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch

from sglang_tokenweave import seams
from sglang_tokenweave.split import Requests

# flashinfer splits a request's keys over several blocks, which leave float32 partial results.
_FLOAT_BYTES = 4


class CapturedAttention(Protocol):
    """The attention of one half of the batches that graphs are for."""

    backend: Any  # SGLang's, which the half's layers call

    def begin(self, batch: Any, requests: Requests) -> None:
        """Make ready to capture a half whose static batch is `batch`, with some requests in it."""

    def refill(self, batch: Any) -> None:
        """Renew on the device what attention reads of the batch. Captured itself."""

    def plan(self, requests: Requests) -> None:
        """Renew what the host says of the requests, before each launch."""


def make(
    name: str, model_runner: Any, *, request_slots: int, most_rows: int, num_sms: int
) -> tuple[CapturedAttention, CapturedAttention]:
    """Return the attention of both halves.

    Args:
        name: of the prefill backend, one of `refusals.GRAPH_ATTENTION_BACKENDS`.
        request_slots: requests of a half, at most.
        most_rows: new tokens of a half, at most.
        num_sms: of the device.

    Raises:
        ValueError: this backend serves the model in a way that was not foreseen.
    """
    first, second = (seams.captured_attention_backend(model_runner) for _ in range(2))
    table = model_runner.req_to_token_pool.req_to_token
    take: Callable[[Any], CapturedAttention] = _Fa3
    if name == "triton":
        context = model_runner.model_config.context_len
        take = partial(_Triton, table, request_slots, context)
    elif name == "flashinfer":
        workspace = _workspace(first, request_slots, most_rows, num_sms)
        take = partial(_FlashInfer, workspace, table, request_slots, most_rows)
    return take(first), take(second)


class _Fa3:
    """SGLang refills its metadata in place."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def begin(self, batch: Any, requests: Requests) -> None:
        self.backend.init_forward_metadata_out_graph(batch, in_capture=True)

    def refill(self, batch: Any) -> None:
        self.backend.init_forward_metadata_out_graph(batch)

    def plan(self, requests: Requests) -> None:
        pass


class _Triton:
    """SGLang has no metadata of prompts for graphs: ours are those that it makes outside of them.

    Its kernel starts blocks for the longest prompt there can be, in every slot; most end at once.
    """

    def __init__(self, table: torch.Tensor, slots: int, max_context: int, backend: Any) -> None:
        _refuse_translation(backend)
        self.backend = backend
        self._table = table
        zeros = partial(torch.zeros, device=table.device)
        self._starts = zeros(slots + 1, dtype=torch.int64)  # of each request's new tokens
        self._cached_starts = zeros(slots + 1, dtype=torch.int32)  # of those before them
        self._cached = zeros(slots * max_context, dtype=torch.int64)

    def begin(self, batch: Any, requests: Requests) -> None:
        metadata = _module_of(self.backend).ForwardMetadata
        self.backend.forward_metadata = metadata(
            **dict.fromkeys(field.name for field in fields(metadata))
            | {
                "max_extend_len": batch.extend_num_tokens,
                "qo_indptr": self._starts,
                "kv_indptr": self._cached_starts,
                "kv_indices": self._cached,
            }
        )

    def refill(self, batch: Any) -> None:
        self._starts[1:].copy_(batch.extend_seq_lens.cumsum(0))
        self._cached_starts[1:].copy_(batch.extend_prefix_lens.cumsum(0))
        _list_slots(self._table, batch, batch.extend_prefix_lens, self._cached_starts, self._cached)

    def plan(self, requests: Requests) -> None:
        pass


class _FlashInfer:
    """One wrapper for all sizes: its grid is that of the largest half, and idle blocks end at once.

    SGLang's own one for prompts in graphs copies the lengths back from the device for each plan,
    which waits for all work before. Here they are known.
    """

    def __init__(
        self, workspace: torch.Tensor, table: torch.Tensor, slots: int, most_rows: int, backend: Any
    ) -> None:
        _refuse_translation(backend)
        if backend.num_wrappers != 1 or backend.prefill_uses_dequant_workspace:
            raise ValueError("flashinfer with sliding windows or a cache that it has to unpack")
        module, updater = _module_of(backend), backend.indices_updater_prefill
        integers = partial(torch.zeros, dtype=torch.int32, device=workspace.device)
        self.backend = backend
        self._metadata = module.PrefillMetadata
        self._table = table
        self._slots = slots
        self._heads = updater.num_qo_heads, updater.head_dim
        self._starts = integers(slots + 1)  # of each request's keys
        self._keys = integers(slots * backend.max_context_len)
        self._wrapper = module.BatchPrefillWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            backend=backend.prefill_backend,
            qo_indptr_buf=integers(slots + 1),
            paged_kv_indptr_buf=self._starts,
            paged_kv_indices_buf=self._keys,
            paged_kv_last_page_len_buf=integers(slots),
        )
        self._set_plan = partial(
            self._wrapper.plan,
            paged_kv_indices=self._keys[:0],  # they are listed in the graph
            paged_kv_last_page_len=torch.ones(slots, dtype=torch.int32),
            num_qo_heads=updater.num_qo_heads,
            num_kv_heads=updater.num_kv_heads,
            head_dim_qk=updater.head_dim,
            page_size=1,  # as SGLang calls it, whatever its own pages are
            q_data_type=updater.q_data_type,
            kv_data_type=updater.data_type,
        )
        event: Any = torch.cuda.Event  # untyped
        self._is_copied = event()
        # The first plan tells the most rows that there will be.
        self.plan(Requests(slice(0, 1), (most_rows,), (0,)))

    def begin(self, batch: Any, requests: Requests) -> None:
        self.plan(requests)
        # Rows of padding are not written: in this memory they are finite.
        out = batch._attn_output.view(-1, *self._heads)
        self._wrapper.run = partial(type(self._wrapper).run, self._wrapper, out=out)
        self.backend.forward_metadata = self._metadata(
            [self._wrapper], use_ragged=False, extend_no_prefix=False
        )

    def refill(self, batch: Any) -> None:
        _list_slots(self._table, batch, batch.seq_lens, self._starts, self._keys)

    def plan(self, requests: Requests) -> None:
        # A plan is copied from pinned memory, which the next one overwrites.
        self._is_copied.synchronize()
        self._set_plan(
            qo_indptr=self._indptr(requests.lengths),
            paged_kv_indptr=self._indptr(requests.ends),
        )
        self._is_copied.record()

    def _indptr(self, counts: Sequence[int]) -> torch.Tensor:
        padded = (0, *counts, *(self._slots - len(counts)) * (0,))
        return torch.tensor(list(accumulate(padded)), dtype=torch.int32)


def _workspace(backend: Any, slots: int, most_rows: int, num_sms: int) -> torch.Tensor:
    """Return memory for the partial results of a half: both halves' are used by turns."""
    updater = backend.indices_updater_prefill
    size = workspace_bytes(
        slots,
        most_rows,
        num_heads=updater.num_qo_heads,
        num_kv_heads=updater.num_kv_heads,
        head_dim=updater.head_dim,
        num_sms=num_sms,
    )
    return torch.empty(size, dtype=torch.uint8, device=backend.workspace_buffer.device)


def workspace_bytes(
    slots: int, most_rows: int, *, num_heads: int, num_kv_heads: int, head_dim: int, num_sms: int
) -> int:
    """Return what flashinfer's plans for graphs take at most, with an eighth to spare.

    As its scheduler.cuh reckons (`PrefillPlan`): blocks for all tiles of queries that the rows may
    fill, the last one of each request in part, or for two blocks on each SM; each with a tile of
    float32 results and their log-sum-exp, for every head.
    """
    group = num_heads // num_kv_heads
    tile = 128 if head_dim < 256 else 64
    tiles = -(-most_rows * group // tile) + slots - 1
    blocks = max(2 * num_sms // num_kv_heads, tiles)
    needed = num_heads * blocks * tile * (head_dim + 1) * _FLOAT_BYTES
    return needed + needed // 8


def _list_slots(
    table: torch.Tensor, batch: Any, counts: torch.Tensor, starts: torch.Tensor, listed: Any
) -> None:
    """List where the KV cache has the first `counts` tokens of each request, one after another."""
    fill: Any = seams.kv_indices_kernel()
    arguments = (table, batch.req_pool_indices, counts, starts, None, listed, table.stride(0))
    fill[(counts.shape[0],)](*arguments)


def _refuse_translation(backend: Any) -> None:
    """Refuse KV pools whose slots are looked up in tables of their own.

    Raises:
        ValueError: this is one.
    """
    translator = getattr(backend, "kv_index_translator", None)  # from 0.5.21
    is_translating = getattr(translator, "is_translating", False)
    if is_translating or getattr(backend, "_translate_kv_loc", None) is not None:
        raise ValueError("a KV cache whose slots are translated")


def _module_of(backend: Any) -> Any:
    return importlib.import_module(type(backend).__module__)
