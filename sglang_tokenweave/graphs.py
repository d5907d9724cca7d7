"""The woven forward of a prefill batch as one CUDA graph: one launch, not dozens a layer.

Attention is inside, and both streams: the communication's is forked and joined by events, which
become edges. A graph serves one number of tokens, its size, cut at one place; a smaller batch is
padded at its end. What differs between two batches of a size is read from memory that stays.
"""

import copy
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from sglang_tokenweave import gemm_sms, seams
from sglang_tokenweave.captured_attention import CapturedAttention
from sglang_tokenweave.plan import GraphShape, Kind, Plan
from sglang_tokenweave.split import Requests
from sglang_tokenweave.transport import SymmetricBuffer, Transport
from sglang_tokenweave.weave import Half

logger = logging.getLogger(__name__)

# Attention kernels are captured for so many: chunks of 8192 tokens hold some fifty chat prompts.
# Unused ones have no tokens and cost next to nothing, but for a row of attention's table.
REQUEST_SLOTS = 64
_WARM_UPS = 2  # the first loads kernels, the second finds every workspace allocated


@dataclass(frozen=True)
class _WovenGraph:
    graph: torch.cuda.CUDAGraph
    halves: tuple[Half, Half]


class WovenGraphs:
    """The graphs of one model, by the tokens they are for."""

    def __init__(
        self,
        run: Callable[[Sequence[Half], Plan], None],
        transport: Transport,
        buffer: SymmetricBuffer,
        attentions: Sequence[CapturedAttention],
        attention_columns: int,
        make_batch: Callable[..., Any],
        max_context: int,
    ) -> None:
        """Allocate what batches are brought to.

        Args:
            run: the woven stages, from the embedding to normalised rows in the slots.
            attentions: one for each half, of these graphs alone.
            attention_columns: of attention's output on this rank.
            make_batch: returns SGLang's ForwardBatch of prompts with the fields that it is given.
            max_context: tokens that a request can have.
        """
        self._run = run
        self._transport = transport
        self._buffer = buffer
        self._attentions = attentions
        self._make_batch = make_batch
        self._max_context = max_context
        rows, like = buffer.capacity, buffer.tensor
        self._input_ids = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self._positions = torch.zeros_like(self._input_ids)
        self._cache_slots = torch.zeros_like(self._input_ids)
        # Of each half: new tokens of a request, tokens before them, and both; its row in the pool.
        self._requests = self._positions.new_zeros(2, 3, REQUEST_SLOTS)
        self._pool_rows = self._positions.new_zeros(2, REQUEST_SLOTS)
        # Attention leaves rows of padding unwritten: whatever is there must be finite.
        self._attention = like.new_zeros(rows, attention_columns)
        # Of both halves, whose last share may be short: one graph runs at a time.
        owned = -(-rows // transport.world_size) + len(attentions)
        self._residual = like.new_zeros(owned, like.shape[1])
        self._graphs: dict[int, _WovenGraph] = {}
        self.shapes: tuple[GraphShape, ...] = ()

    def sibling(self) -> "WovenGraphs":
        """Return graphs in the same memory, none yet: one graph of all runs at a time."""
        other = copy.copy(self)
        other._graphs, other.shapes = {}, ()
        return other

    @cached_property
    def _stream(self) -> Any:
        """Return the stream of all captures: a graph reuses what one on the same stream left."""
        return torch.cuda.Stream(self._buffer.tensor.device)  # type: ignore[no-untyped-call] # torch's gap

    @torch.no_grad()
    def capture(self, num_tokens: int, plan: Plan, least_tokens: int = 1) -> None:
        """Capture the graph of a number of tokens; after a larger one it fits that one's memory.

        Args:
            plan: a woven one.
            least_tokens: smaller batches are not for this graph.
        """
        began = time.perf_counter()
        halves = self._halves(num_tokens, plan.cut)
        with gemm_sms.beside(plan.ctas, self._buffer.tensor.device):
            self._graphs[num_tokens] = _WovenGraph(self._record(halves, plan), halves)
        shape = GraphShape(num_tokens, plan.cut, REQUEST_SLOTS, least_tokens)
        self.shapes = tuple(sorted((*self.shapes, shape)))
        seconds = time.perf_counter() - began
        logger.debug("woven graph of %d tokens captured in %.2f s", num_tokens, seconds)

    def _record(self, halves: tuple[Half, Half], plan: Plan) -> torch.cuda.CUDAGraph:
        pool, stream = seams.graph_pool(), self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run(halves, plan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on with their own CUDA calls meanwhile.
        mode = "thread_local"
        with _no_collection(), torch.cuda.graph(graph, pool, stream, capture_error_mode=mode):
            self._run(halves, plan)
        return graph

    def _halves(self, num_tokens: int, cut: int) -> tuple[Half, Half]:
        one = slice(0, 1)
        requests = Requests(one, (cut,), (0,)), Requests(one, (num_tokens - cut,), (cut,))
        self._fill_requests(requests)
        first = self._half(0, 0, cut, self._residual)
        second = self._half(1, cut, num_tokens, self._residual[first.residual.shape[0] :])
        for half, attention, own in zip((first, second), self._attentions, requests, strict=True):
            attention.begin(half.batch, own)
        second.prepare = partial(self._prepare_attention, (first, second))
        return first, second

    def _half(self, index: int, start: int, stop: int, residual: torch.Tensor) -> Half:
        slot = self._buffer.slot(start, stop)
        owned = slot.owned_rows(self._transport.rank, self._transport.world_size)
        positions = self._positions[start:stop]
        lengths, prefixes, ends = self._requests[index]
        # How far attention's tables of the KV cache are filled, each time.
        longest = torch.tensor([self._max_context, *(REQUEST_SLOTS - 1) * [0]])
        batch = self._make_batch(
            num_tokens=stop - start,
            batch_size=REQUEST_SLOTS,
            input_ids=self._input_ids[start:stop],
            req_pool_indices=self._pool_rows[index],
            seq_lens=ends,
            seq_lens_cpu=longest,
            seq_lens_sum=stop,
            extend_num_tokens=stop - start,
            extend_seq_lens=lengths,
            extend_seq_lens_cpu=lengths.tolist(),
            extend_prefix_lens=prefixes,
            extend_prefix_lens_cpu=prefixes.tolist(),
            positions=positions,
            out_cache_loc=self._cache_slots[start:stop],
            # One half's is read before the other's is written.
            _attn_output=self._attention[: stop - start],
        )
        return Half(
            slot=slot,
            residual=residual[: owned.stop - owned.start],
            positions=positions,
            batch=batch,
            context=partial(seams.attention_context, self._attentions[index].backend, batch),
        )

    def _prepare_attention(self, halves: tuple[Half, Half]) -> None:
        """Refill the metadata of both halves, on the device: dozens of launches otherwise."""
        for half, attention in zip(halves, self._attentions, strict=True):
            attention.refill(half.batch)

    def replay(self, plan: Plan, batch: Any, requests: tuple[Requests, Requests]) -> None:
        """Take a batch through all stages; its normalised rows are in the buffer afterwards.

        The GPU idles until the graph is launched, so few operations may come before.

        Args:
            plan: a woven one with a graph.
            batch: SGLang's ForwardBatch, whole.
            requests: those of each half.
        """
        assert plan.kind is Kind.WEAVE
        woven = self._graphs[plan.graph_tokens]
        # Padding is token 0 of no request, and goes to SGLang's slot 0.
        _fill(self._input_ids[: plan.graph_tokens], batch.input_ids)
        _fill(self._positions[: plan.graph_tokens], batch.positions)
        _fill(self._cache_slots[: plan.graph_tokens], batch.out_cache_loc)
        self._fill_requests(requests)
        for rows, own in zip(self._pool_rows, requests, strict=True):
            indices = batch.req_pool_indices[own.rows]
            rows[: indices.shape[0]].copy_(indices)
        for attention, own in zip(self._attentions, requests, strict=True):
            attention.plan(own)
        woven.graph.replay()

    def _fill_requests(self, requests: tuple[Requests, Requests]) -> None:
        """Bring the lengths of both halves' requests to the device, in one copy."""
        rows = [
            [(*values, *(REQUEST_SLOTS - len(values)) * (0,)) for values in each]
            for each in ((own.lengths, own.prefixes, own.ends) for own in requests)
        ]
        pinned = torch.tensor(rows, pin_memory=self._requests.is_cuda)
        self._requests.copy_(pinned, non_blocking=True)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let Python destroy nothing of its own accord.

    Graphs that are no longer needed wait in reference cycles. To destroy one fails the capture
    under way (pytorch#161037), with torch < 2.12 all later ones in the same memory, too (#180395).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _fill(static: torch.Tensor, rows: torch.Tensor) -> None:
    num_rows = rows.shape[0]
    static[:num_rows].copy_(rows)
    if num_rows < static.shape[0]:  # a launch for nothing otherwise
        static[num_rows:].zero_()
