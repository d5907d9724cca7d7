"""Batches that nobody sent, to run the loaded model on before the first request.

Made as SGLang makes its own for warm-up: a ForwardBatch built field by field. At that time no
request has a KV slot or a row of the table of requests, so the batch borrows free ones without
asking the allocators, and the rows are as before when it is over. What it leaves behind is keys and
values in slots that are free, as every finished request does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sglang_tokenweave import seams
from sglang_tokenweave.plan import Mode

_DECODE_CONTEXT = 512  # tokens that a decoding request has read and written before


def lengths(model_runner: Any, mode: Mode, num_tokens: int) -> tuple[int, ...]:
    """Return the sequence length of each request: prompts as long as they may be, or decodes."""
    longest = int(model_runner.model_config.context_len)
    if mode is Mode.DECODE:
        room = int(model_runner.max_total_num_tokens) // num_tokens
        page = _page_size(model_runner)
        return (min(_DECODE_CONTEXT, longest, room // page * page),) * num_tokens
    count = -(-num_tokens // longest)
    return tuple(num_tokens // count + (i < num_tokens % count) for i in range(count))


def fits(model_runner: Any, mode: Mode, num_tokens: int) -> bool:
    """Whether the server's memory holds such a batch."""
    found = lengths(model_runner, mode, num_tokens)
    page = _page_size(model_runner)
    slots = sum(-(-length // page) * page for length in found)
    has_slots = slots <= int(model_runner.max_total_num_tokens)
    return min(found) > 0 and has_slots and len(found) <= int(model_runner.req_to_token_pool.size)


@contextmanager
def borrowed_rows(model_runner: Any, lengths: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Lend the first requests' rows and slots; yield each request's slots, `[length]`, int64."""
    page = _page_size(model_runner)
    table = model_runner.req_to_token_pool.req_to_token
    rows = slice(1, len(lengths) + 1)  # row 0 and the first page belong to SGLang's padding
    before = table[rows, : max(lengths)].clone()
    slots, start = [], page
    for index, length in enumerate(lengths, 1):
        own = torch.arange(start, start + length, device=table.device)
        table[index, :length] = own.to(table.dtype)
        slots.append(own)
        start += -(-length // page) * page
    try:
        yield slots
    finally:
        table[rows, : max(lengths)] = before


def batch(
    model_runner: Any, mode: Mode, lengths: Sequence[int], slots: Sequence[torch.Tensor]
) -> Any:
    """Return a ForwardBatch: whole prompts, or the last token of each request.

    The tokens are the same on all ranks and of many kinds, so that experts share them as usual.
    """
    decodes = mode is Mode.DECODE
    device = slots[0].device
    parts = [own[-1:] if decodes else own for own in slots]
    positions = [
        torch.arange(length - len(part), length, device=device)
        for length, part in zip(lengths, parts, strict=True)
    ]
    num_tokens = sum(map(len, parts))
    vocabulary = int(model_runner.model_config.vocab_size)
    totals = torch.tensor(lengths, dtype=torch.int64)
    fields = {
        "batch_size": len(lengths),
        "input_ids": torch.arange(num_tokens, device=device) * 7919 % vocabulary,
        "req_pool_indices": torch.arange(1, len(lengths) + 1, device=device),
        "seq_lens": totals.to(device),
        "seq_lens_cpu": totals,
        "orig_seq_lens": totals.to(device, torch.int32),
        "out_cache_loc": torch.cat(parts),
        "seq_lens_sum": sum(lengths),
        "positions": torch.cat(positions),
        "num_tokens": num_tokens,
        **({} if decodes else _extend_fields(lengths, device)),
    }
    return seams.forward_batch(model_runner, is_decode=decodes, **fields)


def _extend_fields(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    sizes = torch.tensor(lengths, dtype=torch.int32, device=device)
    return {
        "extend_num_tokens": sum(lengths),
        "extend_seq_lens": sizes,
        "extend_seq_lens_cpu": list(lengths),
        "extend_prefix_lens": torch.zeros_like(sizes),
        "extend_prefix_lens_cpu": [0] * len(lengths),
        "extend_start_loc": (torch.cumsum(sizes, 0) - sizes).to(torch.int32),
        "extend_logprob_start_lens_cpu": list(lengths),
    }


def _page_size(model_runner: Any) -> int:
    return int(getattr(model_runner, "page_size", 1) or 1)
