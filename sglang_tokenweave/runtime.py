"""The woven forward of one model in one worker process: plan, split, run, count."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sglang_tokenweave import (
    architectures,
    captured_decode,
    gemm_sms,
    pipeline,
    seams,
    weave,
)
from sglang_tokenweave.agreement import Group, compare
from sglang_tokenweave.architectures import Architecture
from sglang_tokenweave.graphs import WovenGraphs
from sglang_tokenweave.pipeline import PipelineStage
from sglang_tokenweave.plan import (
    BatchShape,
    Kind,
    Mode,
    Plan,
    PlanTable,
    plan_batch,
    plan_unsplit,
    where_cut,
)
from sglang_tokenweave.split import (
    UnsplittableError,
    check_fields,
    cut_batch,
    cut_requests,
    lengths_of,
)
from sglang_tokenweave.stats import Stats
from sglang_tokenweave.transport import Slot, SymmetricBuffer, Transport
from sglang_tokenweave.waves import ROW_STEP, LayerShape
from sglang_tokenweave.weave import Context, Half, Stage

logger = logging.getLogger(__name__)

_Part = tuple[Any, Context]  # a ForwardBatch, and SGLang's forward context of it


@dataclass(frozen=True)
class Model:
    """SGLang's model and what of it the woven loop drives."""

    inner: Any  # the `XModel` with embed_tokens, layers and norm
    original: Callable[..., Any]  # its stock forward
    architecture: Architecture
    place: PipelineStage
    first_norm: Any  # SGLang's RMSNorm module before this stage's first attention
    stages: tuple[Stage, ...]
    layer: LayerShape
    num_sms: int  # of the device


class Runtime:
    """Stands in for `XModel.forward`."""

    def __init__(
        self,
        model: Model,
        table: PlanTable,
        transport: Transport,
        buffer: SymmetricBuffer,
        checked: Group | None = None,
    ) -> None:
        """Take over the parts; with `checked`, its ranks compare what they do with each batch."""
        self.model = model
        self.table = table
        self.transport = transport
        self.buffer = buffer
        self._checked = checked
        self.stats = Stats()
        self.runs_stock = False  # the batch under way, whatever the table says: it is compared
        self.is_active = False  # until the attention backends of the halves exist
        self.graphs: WovenGraphs | None = None
        self.cuts_captured_decodes = False  # SGLang's decode graphs can hold two halves
        self.kinds_in_graphs: dict[tuple[Mode, int], Kind] = {}  # in SGLang's own, by tokens
        self._backends: tuple[Any, ...] = ()
        self._owes_metadata = False  # attention's of the batch under way, should it run stock

    def activate(self, backends: tuple[Any, Any], *, cuts_captured_decodes: bool) -> None:
        """Start weaving with an attention backend for each half."""
        self._backends = backends
        self.cuts_captured_decodes = cuts_captured_decodes
        self.is_active = True

    def sizes_to_capture(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return which numbers of tokens are woven: for them a graph is worth its memory."""
        return tuple(size for size in sizes if self.plan_to_capture(size).kind is Kind.WEAVE)

    def plan_to_capture(self, num_tokens: int) -> Plan:
        """Plan a prefill of so many tokens for a graph."""
        shape = BatchShape(Mode.PREFILL, (num_tokens,))
        align = ROW_STEP if num_tokens >= 4 * ROW_STEP else 1
        if num_tokens > self.buffer.capacity:
            return Plan(Kind.OFF)
        return plan_batch(shape, self.table, self.model.layer, self.model.num_sms, align=align)

    def plan(self, batch: Any) -> tuple[BatchShape, Plan] | None:
        """Plan a ForwardBatch from what all ranks know alike; None: not a batch of ours."""
        mode = _mode_of(batch)
        if not self.is_active or self.runs_stock or mode is None:
            return None
        lengths = lengths_of(batch)
        if not lengths or min(lengths) < 1:
            return None
        shape = BatchShape(mode, lengths)
        graphs = () if self.graphs is None else self.graphs.shapes
        plan = plan_batch(shape, self.table, self.model.layer, self.model.num_sms, graphs=graphs)
        if plan.kind is not Kind.OFF and shape.num_tokens > self.buffer.capacity:
            raise UnsplittableError("batch exceeds the symmetric buffer")
        return shape, plan

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: Any = None,
    ) -> Any:
        """Run the layers as planned; the stock loop where there is nothing to gain or to trust.

        Returns:
            What the stock loop does: `[num_tokens, hidden_size]`, normalised by the final norm, or
            PPProxyTensors where another pipeline stage follows.
        """

        def stock() -> Any:
            if self._owes_metadata:
                seams.attention_backend().init_forward_metadata(forward_batch)
            return self.model.original(
                input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors
            )

        if seams.graph_owns_forward():
            plan, parts = self._decide_in_graph(forward_batch, input_embeds)
            if plan.kind is Kind.OFF:
                return stock()
            with gemm_sms.beside(plan.ctas, self.buffer.tensor.device):
                halves = self._halves(None, parts, plan)
                self.weave(halves, plan)
            return self._finish(forward_batch, halves)
        decided = self._decide(forward_batch, input_embeds)
        if self._checked is not None:
            # A rank that went its own way would wait for the others, and they for it.
            text = "stock" if decided is None else f"{decided[1]} of {decided[0]}"
            compare("the plan of a batch", text, self._checked)
        if decided is None:
            return stock()
        shape, plan, parts = decided
        handed_over = None
        if not self.model.place.is_first:
            try:
                handed_over = pipeline.take_over(pp_proxy_tensors, shape.num_tokens)
            except UnsplittableError as error:
                self._fall_back(str(error))
                return stock()
        self._count(shape, plan)
        return self._finish(forward_batch, self._run(forward_batch, parts, plan, handed_over))

    def _finish(self, batch: Any, halves: tuple[Half, ...]) -> Any:
        if not self.model.place.is_last:
            handed_over = pipeline.hand_over(self.buffer, halves, self.model.place.group)
            return seams.pipeline_proxy(*handed_over)
        output = self.buffer.slot(0, batch.input_ids.shape[0]).tensor
        # The buffer is written again by the next batch; captured states outlive this one.
        return output.clone() if batch.capture_hidden_mode.need_capture() else output

    def plan_in_graph(self, mode: Mode, num_tokens: int) -> Plan:
        """Plan what SGLang captures in a graph of its own; only decodes can be cut there."""
        if num_tokens > self.buffer.capacity:
            return Plan(Kind.OFF)
        if mode is Mode.DECODE and self.cuts_captured_decodes:
            shape = BatchShape(mode, (1,) * num_tokens)
            return plan_batch(shape, self.table, self.model.layer, self.model.num_sms)
        return plan_unsplit(mode, num_tokens, self.table)

    def _decide_in_graph(
        self, batch: Any, input_embeds: torch.Tensor | None
    ) -> tuple[Plan, tuple[_Part, ...]]:
        """Return what to do with a batch that SGLang captures, and its parts."""
        mode, num_tokens = _mode_of(batch), batch.input_ids.shape[0]
        is_ours = self.is_active and self.model.place.is_whole and input_embeds is None
        if mode is None or not is_ours:
            return Plan(Kind.OFF), ()
        plan = self.plan_in_graph(mode, num_tokens)
        parts: tuple[_Part, ...] = ((batch, nullcontext),)
        if plan.kind is Kind.WEAVE and seams.graph_is_in_pieces():
            plan = plan_unsplit(mode, num_tokens, self.table)
        elif plan.kind is Kind.WEAVE:
            try:
                parts = captured_decode.cut(batch, plan.cut)
            except UnsplittableError as error:
                self._fall_back(str(error))
                plan = plan_unsplit(mode, num_tokens, self.table)
        self.kinds_in_graphs[mode, num_tokens] = plan.kind
        return plan, parts

    def overrides_stock_graph(self, batch: Any) -> bool | None:
        """Return whether a batch has a graph in spite of what SGLang says; None: it may decide.

        True: one of the weave. False: none, since SGLang's own of this size does less than planned.
        """
        try:
            planned = self.plan(batch)
        except UnsplittableError:
            return None
        if planned is None or planned[1].kind is Kind.OFF:
            return None
        shape, plan = planned
        if plan.graph_tokens:
            return True
        is_the_same = plan.kind is self.kind_in_graph(shape.mode, shape.num_tokens)
        return None if is_the_same else False

    def replay(self, forward: Callable[[], Any]) -> Any:
        """Call SGLang's `forward` of a batch with a graph; attention is prepared inside of that.

        SGLang's own preparation would only let the GPU wait.
        """
        self._owes_metadata = True
        try:
            return forward()
        finally:
            self._owes_metadata = False

    def kind_in_graph(self, mode: Mode, num_tokens: int) -> Kind:
        """Return what SGLang's own graph does with a batch of a size."""
        sizes = [size for of, size in self.kinds_in_graphs if of is mode and size >= num_tokens]
        return self.kinds_in_graphs[mode, min(sizes)] if sizes else Kind.OFF

    def _decide(
        self, batch: Any, input_embeds: torch.Tensor | None
    ) -> tuple[BatchShape, Plan, tuple[Any, ...]] | None:
        """Return what to do with a batch and its parts; None: run it stock.

        The parts are ForwardBatches; for a graph, the Requests of each half.
        """
        try:
            planned = self.plan(batch)
            if planned is None or planned[1].kind is Kind.OFF:
                return None
            return *planned, self._split(batch, planned[1], input_embeds)
        except UnsplittableError as error:
            self._fall_back(str(error))
            return None

    def _split(self, batch: Any, plan: Plan, input_embeds: torch.Tensor | None) -> tuple[Any, ...]:
        if input_embeds is not None:
            raise UnsplittableError("input embeddings")
        if plan.graph_tokens:
            return cut_requests(batch, plan.cut)
        if plan.kind is Kind.WEAVE:
            return cut_batch(batch, plan.cut)
        check_fields(batch)
        return (batch,)

    def _count(self, shape: BatchShape, plan: Plan) -> None:
        self.stats.count(shape.mode, plan.kind, shape.num_tokens)
        if plan.kind is Kind.WEAVE:
            self.stats.cuts[where_cut(shape, plan.cut)] += 1

    def _fall_back(self, reason: str) -> None:
        if self.stats.count_fallback(reason):
            logger.warning(
                "TokenWeave runs such batches stock (said once): %s. See fallbacks in /server_info",
                reason,
            )

    def _run(
        self,
        batch: Any,
        parts: tuple[Any, ...],
        plan: Plan,
        handed_over: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[Half, ...]:
        """Run a batch; what was handed over are hidden states and residual of the stage before."""
        if plan.graph_tokens:
            assert self.graphs is not None
            first, second = parts
            self.graphs.replay(plan, batch, (first, second))
            return ()
        residual = None
        if handed_over is not None:  # normalised in place, on some devices
            normalised, residual = self.model.first_norm(*handed_over)
            self.buffer.slot(0, normalised.shape[0]).tensor.copy_(normalised)
        halves = self._halves(residual, self._prepared(parts), plan)
        self.weave(halves, plan)
        return halves

    def weave(self, halves: Sequence[Half], plan: Plan) -> None:
        """Take halves through all stages: the normalised rows are in their slots afterwards."""
        with (
            seams.partial_sums(),
            architectures.own_reductions_left_out(self.model.architecture, self.model.inner),
        ):
            weave.run(self.model.stages, halves, plan, self.transport)

    def _prepared(self, parts: tuple[Any, ...]) -> tuple[_Part, ...]:
        """Let an attention backend prepare for each part of a batch; SGLang did for a whole one."""
        if len(parts) == 1:
            return ((parts[0], nullcontext),)
        prepared = []
        for part, backend in zip(parts, self._backends, strict=True):
            backend.init_forward_metadata(part)
            prepared.append((part, partial(seams.attention_context, backend, part)))
        return tuple(prepared)

    def _halves(
        self, residual: torch.Tensor | None, parts: tuple[_Part, ...], plan: Plan
    ) -> tuple[Half, ...]:
        halves = []
        start = 0
        for part, context in parts:
            slot = self.buffer.slot(start, start + part.input_ids.shape[0])
            rows = None if residual is None else residual[start:]
            kept = self._residual(slot, rows, is_whole=plan.is_one_shot)
            halves.append(Half(slot, kept, part.positions, part, context, plan.is_one_shot))
            start += slot.num_tokens
        return tuple(halves)

    def _residual(self, slot: Slot, rows: torch.Tensor | None, *, is_whole: bool) -> torch.Tensor:
        """Return the rows of the residual that this rank keeps: its own, or all."""
        owned = slot.owned_rows(self.transport.rank, self.transport.world_size)
        kept = slice(0, slot.num_tokens) if is_whole else owned
        if rows is None:  # the embedding writes it
            return slot.tensor.new_empty(kept.stop - kept.start, slot.tensor.shape[1])
        return rows[kept].clone()


def _mode_of(batch: Any) -> Mode | None:
    mode = batch.forward_mode
    if mode.is_mixed():
        return Mode.MIXED
    if mode.is_decode():
        return Mode.DECODE
    # Exactly EXTEND: verification, drafts and split prefills are extends too, and not ours.
    return Mode.PREFILL if mode.name == "EXTEND" else None
