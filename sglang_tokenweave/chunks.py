"""Shrink SGLang's prefill chunks to batch totals that fill whole GEMM tiles (opt-in)."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_TILE = 256  # tokens; the tallest tile of cuBLAS on Hopper, and a multiple of all common ones
# A smaller chunk loses a larger share of its tokens than a full tile saves. Also keeps clear of the
# 128 tokens that SGLang may take off a chunk for a bounded replay (0.5.23).
_MIN_CHUNK_TOKENS = 1024


def aligned_budget(
    budget: int | None,
    num_mixed_decode_tokens: int,
    page_size: int,
    tile: int = _TILE,
    *,
    floor: int,
) -> int | None:
    """Return the chunk budget, in tokens, shrunk to a batch total that is a multiple of `tile`.

    The result is a multiple of `page_size` if it differs from `budget`; where no page boundary
    meets a tile boundary, the total ends less than a page before one. Unchanged if that would go
    below `floor` or one page, or would leave the last tile no fuller.

    Args:
        budget: tokens of prefill that this pass may still add; None: SGLang does not chunk.
        num_mixed_decode_tokens: decode tokens of the same batch, already taken off the budget.
        page_size: tokens of a page of the KV cache.
        tile: tokens of a GEMM tile.
        floor: smallest budget worth having.

    Raises:
        ValueError: `page_size` or `tile` is below 1, or `num_mixed_decode_tokens` below 0.
    """
    for name, value, least in (
        ("num_mixed_decode_tokens", num_mixed_decode_tokens, 0),
        ("page_size", page_size, 1),
        ("tile", tile, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: got {value}; expected at least {least}")
    if budget is None:
        return None
    whole_tiles = (budget + num_mixed_decode_tokens) // tile * tile - num_mixed_decode_tokens
    # SGLang rounds the first chunk of a request down to pages itself, but not the next ones.
    aligned = whole_tiles // page_size * page_size
    unfilled, before = (-(each + num_mixed_decode_tokens) % tile for each in (aligned, budget))
    if aligned < max(floor, page_size) or unfilled >= before:
        return budget
    return aligned


def nudge_chunk_budget(result: None, adder: Any, *args: Any, **kwargs: Any) -> None:
    """Align the chunk budget of one scheduling pass (AFTER hook on `PrefillAdder.__init__`).

    Reads nothing but the arguments of the pass, which are alike on all ranks.
    """
    if adder.rem_chunk_tokens is None or adder.dllm_config is not None:
        return
    arguments = _signature(type(adder).__init__).bind(adder, *args, **kwargs)
    arguments.apply_defaults()
    adder.rem_chunk_tokens = aligned_budget(
        adder.rem_chunk_tokens,
        arguments.arguments["num_mixed_decode_tokens"],
        adder.page_size,
        floor=max(_MIN_CHUNK_TOKENS, _largest_power_of_two(adder.rem_chunk_tokens)),
    )


@lru_cache(maxsize=8)
def _signature(function: Callable[..., None]) -> inspect.Signature:
    signature = inspect.signature(function)  # of SGLang's own function below the hooks' wrappers
    if "num_mixed_decode_tokens" not in signature.parameters:
        raise TypeError(f"PrefillAdder{signature} has no parameter num_mixed_decode_tokens")
    return signature


def _largest_power_of_two(budget: int) -> int:
    """Return it, at most `budget`: deterministic inference floors chunks to a power of two.

    A budget that passed one must not drop below it, or SGLang would admit nothing.
    """
    return 1 << max(budget, 1).bit_length() - 1
