"""Cut a decode batch in two inside SGLang's own CUDA graph of it.

SGLang refills attention's metadata in place before each replay. Both halves read views of them, so
a replay costs no more than stock's.
"""

import copy
from dataclasses import fields, replace
from functools import partial
from typing import Any

from sglang_tokenweave import seams
from sglang_tokenweave.split import UnsplittableError, cut_unchecked
from sglang_tokenweave.weave import Context

ATTENTION_BACKENDS = frozenset({"fa3"})
# The fields of its metadata, for one token a request. One in none of these sets that holds
# anything but its default is not understood.
_ROWS = frozenset({"cache_seqlens_int32", "page_table"})  # one a request
_SHARED = frozenset({"max_seq_len_q", "max_seq_len_k", "window_size"})  # bounds of any part
_CHANGED = frozenset({"cu_seqlens_q", "cu_seqlens_k", "scheduler_metadata"})


def cut(batch: Any, num_requests: int) -> tuple[tuple[Any, Context], ...]:
    """Return the first requests of a batch that is being captured, and the others.

    Each with SGLang's forward context of it.

    Raises:
        UnsplittableError: attention's metadata are not understood; naming the field.
    """
    backend = seams.attention_backend()
    parts = []
    # Nothing in it needs to be looked at: SGLang has made it up, and its requests ask for nothing.
    for part, requests in cut_unchecked(batch, num_requests):
        own = _backend_of(backend, requests)
        parts.append((part, partial(seams.attention_context, own, part)))
    return tuple(parts)


def _backend_of(backend: Any, requests: slice) -> Any:
    own = copy.copy(backend)
    own.forward_metadata = _metadata_of(backend.forward_metadata, requests)
    return seams.without_splits_of_keys(own)


def _metadata_of(metadata: Any, requests: slice) -> Any:
    for field in fields(metadata):
        is_known = field.name in _ROWS | _SHARED | _CHANGED
        if not is_known and getattr(metadata, field.name) is not field.default:
            raise UnsplittableError(f"field {field.name} of attention's metadata")
    return replace(
        metadata,
        **{name: getattr(metadata, name)[requests] for name in _ROWS},
        cu_seqlens_q=metadata.cu_seqlens_q[: requests.stop - requests.start + 1],
        cu_seqlens_k=None,  # decoding does not read it
        scheduler_metadata=None,  # of the whole; without, each layer computes its own
    )
