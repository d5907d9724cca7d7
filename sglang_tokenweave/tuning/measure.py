"""Time candidates on the loaded model: whole forward passes, as SGLang will run them.

OFF is whatever stock SGLang does with such a batch, its graphs included; a candidate is what the
real Runtime does with it, in the graph that it would have: WEAVE of a prefill in one of its own,
all else in SGLang's. A time is that of the slowest rank, and so is the clock: all ranks see
the same numbers, so that a search that decides by them does the same on all of them.

Of a deep model only the first layers and the last run, whatever runs them: layers are alike, and
capturing a graph takes as long as it has layers. Times are scaled to all layers, which counts what
is outside of them several times; the weave has more of that than stock, so it is chosen no sooner.

A prefill is timed with what the device waits for its start. Decodes come one after another: they
are timed in a row, behind one that keeps the device busy while the next is prepared. Both run
behind one of their own kind, in an order that changes: a GPU at its power limit gives more to what
follows a batch that waited for the link, and less to what follows one that did not.

Before it is timed, a candidate has to give stock's logits, roughly: no table has one that is wrong.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sglang_tokenweave import capturing, dummy, seams, stock_graphs
from sglang_tokenweave.agreement import DisagreementError, Group
from sglang_tokenweave.graphs import WovenGraphs
from sglang_tokenweave.plan import Kind, Mode, PlanRow, PlanTable
from sglang_tokenweave.runtime import Runtime
from sglang_tokenweave.stats import Stats
from sglang_tokenweave.stock_graphs import Taken
from sglang_tokenweave.tuning.clock import clock_of
from sglang_tokenweave.tuning.table import OFF, Candidate
from sglang_tokenweave.weave import Stage

logger = logging.getLogger(__name__)
MOST_LAYERS = 8  # that run
# Of logits, relative to stock's. Another order of roundings may send a token to another expert, so
# it has to be large; logits that have nothing to do with stock's are sqrt(2) away.
MOST_DIFFERENCE = 0.5
_COMPARED_ROWS = 8
_IN_A_ROW = {Mode.PREFILL: 2, Mode.DECODE: 4}  # of which the first is not timed


class NotMeasurableError(RuntimeError):
    """No time was found, or one that would not be the candidate's: it did not run as planned."""


class Meter:
    """Runs batches of a model that serves nobody yet, and times them."""

    def __init__(self, model_runner: Any, runtime: Runtime, group: Group) -> None:
        """Start the clock; `group` holds the ranks that run the model together."""
        self._model_runner = model_runner
        self._runtime = runtime
        self._group = group
        inner = runtime.model.inner
        self._layers = inner.end_layer - inner.start_layer
        is_on_cpu = model_runner.device == "cpu"
        self._why_no_graphs = "on a CPU" if is_on_cpu else capturing.why_not(model_runner, runtime)
        found = () if is_on_cpu else stock_graphs.find(model_runner, runtime)
        self._stock = {graphs.mode: graphs for graphs in found}
        self._as_loaded = {mode: graphs.take() for mode, graphs in self._stock.items()}
        self._first_woven: WovenGraphs | None = None  # whose memory all others share
        self._size: tuple[Mode, int] | None = None
        self._turn_to(None)
        self._began = time.perf_counter()
        self._spent_s = 0.0

    def spent_s(self) -> float:
        """Return the seconds from the start to the end of the last measurement, on all ranks."""
        return self._spent_s

    def measure(
        self, candidates: Sequence[Candidate], mode: Mode, tokens: int, rounds: int
    ) -> list[list[float]]:
        """Return the times of each candidate in us, one a round; a collective call.

        Every round runs all candidates once, after the ranks have met. Before its first round a
        candidate runs once untimed: graphs are captured, kernels are chosen and memory is allocated
        then, and its logits are compared with those of OFF, which comes first at every size. With 0
        rounds, that is all. What was captured is kept until another size is measured.

        Raises:
            NotMeasurableError: a candidate failed, gave other logits than stock, or did not run as
                planned; on all ranks.
        """
        times: list[list[float]] = [[] for _ in candidates]
        with self._aside():
            try:
                self._run(candidates, mode, tokens, times, rounds)
                problems = [_problem(reason) for reason in self._runtime.stats.fallbacks]
            except NotMeasurableError as error:
                problems = [str(error)]
            except Exception as error:  # noqa: BLE001 - whatever it is, such a server runs stock
                problems = [f"{type(error).__name__}: {error}"]
        return self._agree(times, problems)

    def _turn_to(self, size: tuple[Mode, int] | None) -> None:
        """Drop what was captured and found of another size."""
        if size is not None and size == self._size:
            return
        self._size = size
        self._woven: dict[Candidate, WovenGraphs | None] = {}
        self._in_stock_graphs: dict[Candidate, Taken] = {}
        self._warm: set[Candidate] = set()
        self._stock_logits = torch.empty(0)

    def _run(
        self,
        candidates: Sequence[Candidate],
        mode: Mode,
        tokens: int,
        times: list[list[float]],
        rounds: int,
    ) -> None:
        self._turn_to((mode, tokens))
        lengths = dummy.lengths(self._model_runner, mode, tokens)
        with dummy.borrowed_rows(self._model_runner, lengths) as slots:

            def prepared(candidate: Candidate, count: int) -> list[Callable[[], Any]]:
                batches = [
                    dummy.batch(self._model_runner, mode, lengths, slots) for _ in range(count)
                ]
                self._bring_about(candidate, mode, tokens)
                return [partial(self._model_runner.forward, batch) for batch in batches]

            for candidate in candidates:
                if candidate not in self._warm:
                    (run,) = prepared(candidate, 1)
                    output = run()
                    self._compare(candidate, mode, tokens, seams.next_token_logits(output))
                    self._warm.add(candidate)
            for number in range(rounds):
                self._group.gather(None)
                order = random.Random(f"{mode} {tokens} {number}")  # the same on all ranks
                for index in order.sample(range(len(candidates)), len(candidates)):
                    runs = prepared(candidates[index], _in_a_row(mode, slots[0].device))
                    times[index].append(_time_us(runs, slots[0].device, mode))

    def _compare(self, candidate: Candidate, mode: Mode, tokens: int, logits: torch.Tensor) -> None:
        # A copy: a graph writes into the same memory again.
        rows = logits[:_COMPARED_ROWS].to(torch.float32, copy=True)
        if candidate == OFF:
            self._stock_logits = rows
        elif differ(rows, self._stock_logits):
            raise NotMeasurableError(
                f"{candidate.kind} of a {mode} of {tokens} tokens gives other logits than stock"
            )

    def _bring_about(self, candidate: Candidate, mode: Mode, tokens: int) -> None:
        """Let the next batch of this size run the candidate, in the graph that it would have."""
        self._turn_to((mode, tokens))
        self._runtime.table = _always(mode, candidate)
        self._runtime.graphs = None
        if mode is Mode.DECODE or candidate.kind is not Kind.WEAVE:
            self._use_stock_graph(candidate, mode, tokens)
        else:
            self._runtime.graphs = self._woven_graph(candidate, tokens)

    def _woven_graph(self, candidate: Candidate, tokens: int) -> WovenGraphs | None:
        if self._why_no_graphs or tokens > max(seams.graph_sizes(self._model_runner)):
            return None
        if candidate not in self._woven:
            try:
                graphs = capturing.capture(
                    self._model_runner, self._runtime, tokens, self._first_woven
                )
            except DisagreementError as error:  # on all ranks: a server would do without, too
                if self._group.rank == 0:
                    logger.warning("TokenWeave times a woven prefill without a graph: %s", error)
                graphs = None
            self._woven[candidate] = graphs
            self._first_woven = self._first_woven or graphs
        return self._woven[candidate]

    def _use_stock_graph(self, candidate: Candidate, mode: Mode, tokens: int) -> None:
        """Let SGLang replay a graph that has the candidate inside, if it has one of this size."""
        graphs = self._stock.get(mode)
        if graphs is None or (size := graphs.size_for(tokens)) is None:
            return
        if candidate not in self._in_stock_graphs:
            graphs.put_back(self._as_loaded[mode])
            kinds = {candidate.kind, self._runtime.kind_in_graph(mode, size)}
            if kinds != {Kind.OFF} or self._layers > MOST_LAYERS:
                try:
                    capturing.capture_again(graphs, (size,))
                except DisagreementError as error:
                    raise NotMeasurableError(str(error)) from error
            self._in_stock_graphs[candidate] = graphs.take()
        graphs.put_back(self._in_stock_graphs[candidate])

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave the runtime's table, graphs and counters as they were."""
        table, graphs, stats = self._runtime.table, self._runtime.graphs, self._runtime.stats
        self._runtime.stats = Stats()
        try:
            with torch.no_grad(), self._shallow():
                yield
        finally:
            self._runtime.table, self._runtime.graphs = table, graphs
            self._runtime.stats = stats
            for mode, loaded in self._as_loaded.items():
                self._stock[mode].put_back(loaded)

    @contextmanager
    def _shallow(self) -> Iterator[None]:
        """Leave out all layers between the first ones and the last, which ends as no other does."""
        model = self._runtime.model
        inner, layers, end = model.inner, model.inner.layers, model.inner.end_layer
        left_out = max(0, self._layers - MOST_LAYERS)
        inner.end_layer = end - left_out
        inner.layers = torch.nn.ModuleList([*layers[: inner.end_layer - 1], *layers[end - 1 :]])
        self._runtime.model = replace(model, stages=_without_layers(model.stages, left_out))
        try:
            yield
        finally:
            inner.layers, inner.end_layer, self._runtime.model = layers, end, model

    def _agree(self, times: list[list[float]], problems: list[str]) -> list[list[float]]:
        spent_s = time.perf_counter() - self._began
        ranks = self._group.gather((times, spent_s, problems))
        self._spent_s = max(spent for _, spent, _ in ranks)
        reasons = sorted({reason for _, _, found in ranks for reason in found})
        if reasons:
            raise NotMeasurableError("; ".join(reasons))
        by_candidate = zip(*(measured for measured, _, _ in ranks), strict=True)
        scale = max(1, self._layers / MOST_LAYERS)
        return [
            [scale * max(of_round) for of_round in zip(*each, strict=True)] for each in by_candidate
        ]


def differ(logits: torch.Tensor, stock: torch.Tensor) -> bool:
    """Whether logits are further from stock's than rounding explains.

    Args:
        logits, stock: `[rows, vocabulary]`, float32. Not finite ones of stock tell nothing.
    """
    if not bool(stock.isfinite().all()):
        return False
    return not bool((logits - stock).norm() <= MOST_DIFFERENCE * stock.norm())  # NaN differs


def _without_layers(stages: tuple[Stage, ...], count: int) -> tuple[Stage, ...]:
    """Return the stages without those of so many layers before the last; two are of a layer."""
    if not count:
        return stages
    before = len(stages) - 2 * (count + 1)
    # What comes before the last layer now has to end with that one's first norm.
    joint = replace(stages[before - 1], weight=stages[-3].weight, eps=stages[-3].eps)
    return (*stages[: before - 1], joint, *stages[-2:])


def _problem(reason: str) -> str:
    return f"a batch ran stock though planned: {reason}"


def _always(mode: Mode, candidate: Candidate) -> PlanTable:
    row = PlanRow(
        mode,
        1,
        candidate.kind,
        ctas=candidate.ctas,
        fuse_ctas=candidate.fuse_ctas,
        cut_offset=candidate.cut_offset,
    )
    return PlanTable((row,))


def _in_a_row(mode: Mode, device: torch.device) -> int:
    # A CPU prepares nothing ahead.
    return _IN_A_ROW[mode] if device.type == "cuda" else 1


def _time_us(runs: Sequence[Callable[[], object]], device: torch.device, mode: Mode) -> float:
    """Return how long the device works on one of `runs`; of several the first is not timed.

    Prefills start on an idle device, and the wait for that is included.
    """
    ahead, timed = (runs[:1], runs[1:]) if len(runs) > 1 else ([], runs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for run in ahead:
        run()
    if device.type == "cuda" and mode is Mode.PREFILL:
        torch.cuda.synchronize(device)
    _, read_us = clock_of(device).time(lambda: [run() for run in timed])
    return read_us() / len(timed)
