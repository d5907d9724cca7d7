"""Make SGLang's attention and feed-forward modules leave partial sums in a slot.

The modules are used as they are. While a destination is set, their row-parallel projections write
there instead of into fresh memory; SGLang's own flag keeps them from reducing (seams.partial_sums).
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sglang_tokenweave import seams
from sglang_tokenweave.weave import Half

# One forward pass runs at a time in a worker process, on one thread, as in SGLang's own contexts.
_destination: torch.Tensor | None = None


@contextmanager
def _into(destination: torch.Tensor) -> Iterator[None]:
    global _destination
    previous, _destination = _destination, destination
    try:
        yield
    finally:
        _destination = previous


def redirect(linear: Any) -> None:
    """Let a `RowParallelLinear` write into the current destination, if one is set.

    Unquantized weights are multiplied straight into it; the results of others are copied.
    """
    original = linear.forward
    if not hasattr(linear.quant_method, "apply_into"):
        return

    @functools.wraps(original)
    def forward(input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Some kernels hand over a pair, values and scales: their result is copied.
        is_plain = isinstance(input_, torch.Tensor)
        if _destination is None or not is_plain or input_.shape[0] != _destination.shape[0]:
            return original(input_, *args, **kwargs)
        return original(input_, *args, output_tensor=_destination, **kwargs)

    linear.forward = forward


def embedding(module: Any) -> Callable[[Half], None]:
    """Return the embedding as a stage's computation: the residual begins with its sum."""

    def compute(half: Half) -> None:
        half.slot.tensor.copy_(seams.partial_embedding(module, half.batch.input_ids))
        half.residual.zero_()
        if half.prepare is not None:
            half.prepare()  # the other half's embeddings travel meanwhile

    return compute


def attention(module: Any) -> Callable[[Half], None]:
    """Return the attention half of a decoder layer as a stage's computation."""

    def compute(half: Half) -> None:
        with half.context(), _into(half.slot.tensor):
            result = module(
                positions=half.positions,
                hidden_states=half.slot.tensor,
                forward_batch=half.batch,
            )
            _keep(result, half.slot.tensor)

    return compute


def feed_forward(module: Any) -> Callable[[Half], None]:
    """Return the feed-forward half of a decoder layer as a stage's computation."""
    takes_batch = "forward_batch" in inspect.signature(module.forward).parameters

    def compute(half: Half) -> None:
        extra = (half.batch,) if takes_batch else ()
        with half.context(), _into(half.slot.tensor):
            _keep(module(half.slot.tensor, *extra), half.slot.tensor)

    return compute


def _keep(result: torch.Tensor, destination: torch.Tensor) -> None:
    if result.data_ptr() != destination.data_ptr():
        destination.copy_(result)
