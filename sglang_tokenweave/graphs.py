"""The woven forward of a prefill batch as one CUDA graph: one launch, not dozens a layer.

Attention is inside, and both streams: the communication's is forked and joined by events, which
become edges. A graph serves one number of tokens, its size, cut at one place; a smaller batch is
padded at its end. What differs between two batches of a size is read from memory that stays.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sglang_tokenweave import seams
from sglang_tokenweave.gemm_sms import for_gemms
from sglang_tokenweave.plan import GraphShape, Kind, Plan
from sglang_tokenweave.split import pad_requests
from sglang_tokenweave.transport import SymmetricBuffer, Transport
from sglang_tokenweave.weave import Half

logger = logging.getLogger(__name__)

# Attention kernels are captured for so many; unused ones have no tokens and cost next to nothing.
REQUEST_SLOTS = 32
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
        backends: Sequence[Any],
        attention_columns: int,
        make_batch: Callable[..., Any],
    ) -> None:
        """Allocate what batches are brought to.

        Args:
            run: the woven layers, from normalised rows in the slots to normalised rows there.
            backends: SGLang's attention backends, one for each half, of these graphs alone.
            attention_columns: of attention's output on this rank.
            make_batch: returns SGLang's ForwardBatch of prompts with the fields that it is given.
        """
        self._run = run
        self._transport = transport
        self._buffer = buffer
        self._backends = backends
        self._make_batch = make_batch
        rows, like = buffer.capacity, buffer.tensor
        self._positions = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self._cache_slots = torch.zeros_like(self._positions)
        # Attention leaves rows of padding unwritten: whatever is there must be finite.
        self._attention = like.new_zeros(rows, attention_columns)
        self._graphs: dict[int, _WovenGraph] = {}
        self.shapes: tuple[GraphShape, ...] = ()

    def capture(self, plans: Iterable[tuple[int, Plan]]) -> None:
        """Capture a graph for each number of tokens, the largest first: others fit its memory."""
        pool = seams.graph_pool()
        stream = torch.cuda.Stream(self._buffer.tensor.device)  # type: ignore[no-untyped-call] # torch's gap
        for num_tokens, plan in sorted(plans, key=lambda entry: -entry[0]):
            began = time.perf_counter()
            self._graphs[num_tokens] = self._capture(num_tokens, plan, pool, stream)
            shape = GraphShape(num_tokens, plan.cut, REQUEST_SLOTS)
            self.shapes = tuple(sorted((*self.shapes, shape)))
            seconds = time.perf_counter() - began
            logger.debug("woven graph of %d tokens captured in %.2f s", num_tokens, seconds)

    @torch.no_grad()
    def _capture(
        self, num_tokens: int, plan: Plan, pool: Any, stream: torch.cuda.Stream
    ) -> _WovenGraph:
        halves = self._halves(num_tokens, plan.cut)
        with self._left_sms(plan):
            return _WovenGraph(self._record(halves, plan, pool, stream), halves)

    def _record(
        self, halves: tuple[Half, Half], plan: Plan, pool: Any, stream: torch.cuda.Stream
    ) -> torch.cuda.CUDAGraph:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run(halves, plan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on with their own CUDA calls meanwhile.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            self._run(halves, plan)
        return graph

    def _left_sms(self, plan: Plan) -> AbstractContextManager[None]:
        """Return a context in which GEMMs count on the SMs that the communication leaves them."""
        if plan.ctas == 0:
            return nullcontext()
        device = torch.cuda.get_device_properties(self._buffer.tensor.device)
        return for_gemms(device.multi_processor_count - plan.ctas)

    def _halves(self, num_tokens: int, cut: int) -> tuple[Half, Half]:
        bounds = ((0, cut), (cut, num_tokens))
        first, second = (
            self._half(start, stop, backend)
            for (start, stop), backend in zip(bounds, self._backends, strict=True)
        )
        return first, second

    def _half(self, start: int, stop: int, backend: Any) -> Half:
        slot = self._buffer.slot(start, stop)
        owned = slot.owned_rows(self._transport.rank, self._transport.world_size)
        positions = self._positions[start:stop]
        batch = self._make_batch(
            **_one_request(start, stop, positions.device),
            positions=positions,
            out_cache_loc=self._cache_slots[start:stop],
            # One half's is read before the other's is written.
            _attn_output=self._attention[: stop - start],
        )
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        return Half(
            slot=slot,
            residual=torch.zeros_like(slot.tensor[owned]),
            positions=positions,
            batch=batch,
            context=partial(seams.attention_context, backend, batch),
        )

    def replay(self, plan: Plan, parts: Sequence[Any], residual: torch.Tensor) -> None:
        """Take a batch through the layers; its normalised rows are in the buffer, and then again.

        Args:
            plan: a woven one with a graph.
            parts: SGLang's ForwardBatch of each half.
            residual: `[num_tokens, hidden_size]`.
        """
        assert plan.kind is Kind.WEAVE
        woven = self._graphs[plan.graph_tokens]
        start = 0
        for half, part, backend in zip(woven.halves, parts, self._backends, strict=True):
            num_tokens = part.positions.shape[0]
            owned = half.slot.owned_rows(self._transport.rank, self._transport.world_size)
            _fill(half.positions, part.positions)
            _fill(half.batch.out_cache_loc, part.out_cache_loc)  # padding goes to SGLang's slot 0
            _fill(half.residual, residual[start : start + num_tokens][owned])
            half.slot.tensor[num_tokens:].zero_()
            backend.init_forward_metadata_out_graph(pad_requests(part, REQUEST_SLOTS))
            start += num_tokens
        woven.graph.replay()


def _fill(static: torch.Tensor, rows: torch.Tensor) -> None:
    static[: rows.shape[0]].copy_(rows)
    static[rows.shape[0] :].zero_()


def _one_request(start: int, stop: int, device: torch.device) -> dict[str, Any]:
    """Return fields of a ForwardBatch: tokens of one request, and slots of requests without any."""
    rest = (REQUEST_SLOTS - 1) * [0]
    lengths, prefixes = [stop - start, *rest], [start, *rest]
    ends = torch.tensor([stop, *rest])
    return {
        "num_tokens": stop - start,
        "batch_size": REQUEST_SLOTS,
        "input_ids": torch.zeros(stop - start, dtype=torch.int64, device=device),
        "req_pool_indices": torch.zeros(REQUEST_SLOTS, dtype=torch.int64, device=device),
        "seq_lens": ends.to(device),
        "seq_lens_cpu": ends,
        "seq_lens_sum": stop,
        "extend_num_tokens": stop - start,
        "extend_seq_lens": torch.tensor(lengths, device=device),
        "extend_seq_lens_cpu": lengths,
        "extend_prefix_lens": torch.tensor(prefixes, device=device),
        "extend_prefix_lens_cpu": prefixes,
    }
