"""Cut SGLang's ForwardBatch in two at any token, inside a request too.

Every field of ForwardBatch is in one of the tables below. A field in none of them that holds
anything but its default stops the split: better an unwoven batch than a half-understood one.
"""

import copy
import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

TOKEN_FIELDS = frozenset({"input_ids", "positions", "out_cache_loc", "out_cache_loc_virtual"})
REQUEST_FIELDS = frozenset(
    {
        "req_pool_indices",
        "req_pool_indices_cpu",
        "seq_lens",
        "seq_lens_cpu",
        "orig_seq_lens",
        "extend_seq_lens",
        "extend_seq_lens_cpu",
        "extend_prefix_lens",
        "extend_prefix_lens_cpu",
        "extend_start_loc",
        "extend_logprob_start_lens_cpu",
        "lora_ids",
        "rids",
    }
)
# Set anew for each half, in `_computed`.
COMPUTED_FIELDS = frozenset(
    {
        "batch_size",
        "seq_lens_sum",
        "extend_num_tokens",
        "num_token_non_padded",
        "num_token_non_padded_cpu",
        "global_num_token_non_padded",
        "global_num_token_non_padded_cpu",
        "mrope_positions",
        "kv_loc_plan",
        "kv_loc_cols",
        "forward_metadata_ready",
        "forward_metadata_planned_bs",
        "forward_metadata_planned_num_tokens",
        "forward_metadata_replan_equivalent",
    }
)
# True of the whole forward pass, so true of each half.
SHARED_FIELDS = frozenset(
    {
        "forward_mode",
        "global_forward_mode",
        "return_logprob",
        "is_prefill_only",
        "spec_algorithm",
        "is_extend_in_batch",
        "can_run_dp_cuda_graph",
        "can_run_dp_breakable_cuda_graph",
        "can_run_decode_cuda_graph",
        "can_run_dp_draft_cuda_graph",
        "can_run_dp_prefill_cuda_graph",
        "dp_prefill_cuda_graph_max_prefix_len",
        "dp_spec_prefill_coordination_applied",
        "capture_hidden_mode",
        "defer_logits_to_eager",
        "return_hidden_states_before_norm",
        "return_pooled_hidden_states",
        "contains_last_prefill_chunk",
        "out_cache_loc_is_physical",
        "attn_tp_sequence_sharded",
        "encoder_swa_replay",
        "max_seq_len_host",  # an upper bound of the whole batch bounds each half
        "reuse_dsa_topk_indices",
    }
)
# Read after the layers only, from the unsplit batch: the logits processor and the sampler.
AFTERWARDS_FIELDS = frozenset(
    {
        "sampling_info",
        "temperature",
        "top_p",
        "top_logprobs_nums",
        "token_ids_logprobs",
        "extend_input_logprob_token_ids_gpu",
        "next_token_logits_buffer",
        "dimensions",
        "watermark_prompt_tail_ids",
        "watermark_context_hash_history",
    }
)
_KNOWN = TOKEN_FIELDS | REQUEST_FIELDS | COMPUTED_FIELDS | SHARED_FIELDS | AFTERWARDS_FIELDS


class UnsplittableError(Exception):
    """This batch cannot be cut; the text is a stable reason, fit for a metric's label."""


@dataclasses.dataclass(frozen=True)
class Span:
    """The part of a batch that one half takes: tokens, requests, and tokens cut off at its ends."""

    tokens: slice
    requests: slice
    skipped: int  # tokens of the first request that lie before this half
    dropped: int  # tokens of the last request that lie after it


@dataclasses.dataclass(frozen=True)
class Requests:
    """The requests of one half as attention sees them; all of it is known on the CPU."""

    rows: slice  # of the batch's requests
    lengths: tuple[int, ...]  # new tokens of each
    prefixes: tuple[int, ...]  # tokens of each before those

    @property
    def ends(self) -> tuple[int, ...]:
        """Return how many tokens of each request the half may look back on, its own included."""
        return tuple(map(sum, zip(self.lengths, self.prefixes, strict=True)))


def spans(lengths: tuple[int, ...], cut: int) -> tuple[Span, Span]:
    """Return the two parts of a batch of `lengths` (new tokens per request) cut after `cut` tokens.

    Raises:
        ValueError: the cut is not strictly inside the batch.
    """
    ends = list(accumulate(lengths))
    if not ends or not 0 < cut < ends[-1]:
        raise ValueError(f"cut={cut} is not inside a batch of {ends[-1] if ends else 0} tokens")
    last = next(index for index, end in enumerate(ends) if end >= cut)
    taken = cut - (ends[last] - lengths[last])
    inside = cut < ends[last]
    first = Span(slice(0, cut), slice(0, last + 1), skipped=0, dropped=lengths[last] - taken)
    second = Span(
        slice(cut, ends[-1]),
        slice(last if inside else last + 1, len(lengths)),
        skipped=taken if inside else 0,
        dropped=0,
    )
    return first, second


def lengths_of(batch: Any) -> tuple[int, ...]:
    """Return the new tokens per request of a ForwardBatch: 1 each when decoding."""
    if batch.forward_mode.is_decode():
        return (1,) * int(batch.batch_size)
    if batch.extend_seq_lens_cpu is None:
        raise UnsplittableError("request lengths are on the device only")
    return tuple(int(length) for length in batch.extend_seq_lens_cpu)


def cut_batch(batch: Any, cut: int) -> tuple[Any, Any]:
    """Return two ForwardBatches with the first `cut` tokens of `batch` and the rest.

    The parts hold what the layers and the attention metadata read; logits are computed from the
    unsplit batch. Tensors are views except where a cut request changes them.

    Raises:
        UnsplittableError: naming the field that is not understood.
    """
    lengths = _splittable_lengths(batch)
    first, second = spans(lengths, cut)
    return _part(batch, first), _part(batch, second)


def cut_unchecked(batch: Any, cut: int) -> tuple[tuple[Any, slice], ...]:
    """Return the parts of a batch that SGLang made for itself, and the requests of each."""
    parts = spans(lengths_of(batch), cut)
    return tuple((_part(batch, span), span.requests) for span in parts)


def cut_requests(batch: Any, cut: int) -> tuple[Requests, Requests]:
    """Return the requests of the first `cut` tokens of a prefill batch and those of the rest.

    Nothing is computed on the device, where each operation would be a launch.

    Raises:
        UnsplittableError: as of `cut_batch`.
    """
    lengths = _splittable_lengths(batch)
    if batch.extend_prefix_lens_cpu is None:
        raise UnsplittableError("prefix lengths are on the device only")
    first, second = (
        _requests(span, lengths, batch.extend_prefix_lens_cpu) for span in spans(lengths, cut)
    )
    return first, second


def _requests(span: Span, lengths: tuple[int, ...], prefixes: Sequence[int]) -> Requests:
    own, before = list(lengths[span.requests]), [int(each) for each in prefixes[span.requests]]
    own[-1] -= span.dropped
    own[0] -= span.skipped
    before[0] += span.skipped
    return Requests(span.requests, tuple(own), tuple(before))


def _splittable_lengths(batch: Any) -> tuple[int, ...]:
    check_fields(batch)
    lengths = lengths_of(batch)
    if sum(lengths) != batch.input_ids.shape[0] or len(lengths) != batch.batch_size:
        raise UnsplittableError("batch is padded")
    if batch.seq_lens_cpu is None:
        raise UnsplittableError("sequence lengths are on the device only")
    return lengths


def check_fields(batch: Any) -> None:
    """Refuse a batch in which a field outside the tables carries something.

    Raises:
        UnsplittableError: naming the field.
    """
    for field in dataclasses.fields(batch):
        if field.name not in _KNOWN and not _is_default(getattr(batch, field.name), field):
            raise UnsplittableError(f"field {field.name}")


def _is_default(value: Any, field: Any) -> bool:
    if value is None or value is field.default:
        return True
    if isinstance(value, bool | int):
        return bool(value == field.default)
    # One entry per request, none of them set: SGLang's way to say "no request has any".
    return isinstance(value, list) and all(entry is None for entry in value)


def _part(batch: Any, span: Span) -> Any:
    part = copy.copy(batch)
    names = {field.name for field in dataclasses.fields(batch)}
    for name in TOKEN_FIELDS & names:
        _slice(part, name, span.tokens)
    for name in REQUEST_FIELDS & names:
        _slice(part, name, span.requests)
    for name in AFTERWARDS_FIELDS & names:
        setattr(part, name, None)
    computed = _computed(batch, part, span)
    for name in COMPUTED_FIELDS & names:
        setattr(part, name, computed[name])
    if not batch.forward_mode.is_decode():
        _trim_requests(part, span)
    part.seq_lens_sum = int(sum(part.seq_lens_cpu))
    return part


def _slice(part: Any, name: str, rows: slice) -> None:
    value = getattr(part, name)
    if value is not None:
        setattr(part, name, value[rows])


def _computed(batch: Any, part: Any, span: Span) -> dict[str, Any]:
    num_tokens = span.tokens.stop - span.tokens.start
    mrope = getattr(batch, "mrope_positions", None)
    kv_loc_plan = getattr(batch, "kv_loc_plan", None)
    return {
        "batch_size": span.requests.stop - span.requests.start,
        "seq_lens_sum": None,
        "extend_num_tokens": None if batch.forward_mode.is_decode() else num_tokens,
        "num_token_non_padded": _count_like(batch, "num_token_non_padded", num_tokens),
        "num_token_non_padded_cpu": num_tokens,
        "global_num_token_non_padded": _count_like(
            batch, "global_num_token_non_padded", num_tokens
        ),
        "global_num_token_non_padded_cpu": num_tokens,
        "mrope_positions": None if mrope is None else mrope[:, span.tokens],
        # The iteration's plan of KV slots is one; each half writes its own columns of it.
        "kv_loc_plan": kv_loc_plan,
        "kv_loc_cols": None
        if kv_loc_plan is None
        else kv_loc_plan.cols_slice(batch.kv_loc_cols, span.tokens),
        "forward_metadata_ready": False,
        "forward_metadata_planned_bs": None,
        "forward_metadata_planned_num_tokens": None,
        "forward_metadata_replan_equivalent": False,
    }


def _count_like(batch: Any, name: str, num_tokens: int) -> torch.Tensor | None:
    count = getattr(batch, name, None)
    return None if count is None else torch.full_like(count, num_tokens)


def _trim_requests(part: Any, span: Span) -> None:
    """Shorten the requests that the cut goes through, on the CPU and on the device."""
    if span.dropped:
        _add(part, "extend_seq_lens", -1, -span.dropped)
        _add(part, "seq_lens", -1, -span.dropped)
    if span.skipped:
        _add(part, "extend_seq_lens", 0, -span.skipped)
        _add(part, "extend_prefix_lens", 0, span.skipped)
    if part.extend_start_loc is not None:
        lengths = part.extend_seq_lens
        part.extend_start_loc = (torch.cumsum(lengths, 0) - lengths).to(part.extend_start_loc.dtype)


def _add(part: Any, name: str, index: int, amount: int) -> None:
    for field in (name, f"{name}_cpu"):
        value = getattr(part, field)
        if value is not None:
            changed = value.clone() if isinstance(value, torch.Tensor) else list(value)
            changed[index] += amount
            setattr(part, field, changed)
