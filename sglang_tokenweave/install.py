"""Decide at load whether this model is woven, and put the woven forward in place if it is."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sglang_tokenweave import (
    announcement,
    architectures,
    captured_decode,
    capturing,
    deadlines,
    model_facts,
    refusals,
    seams,
    topology,
    transports,
)
from sglang_tokenweave.agreement import DisagreementError, Group, as_group, gather
from sglang_tokenweave.config import TokenWeaveConfig, describe
from sglang_tokenweave.pipeline import PipelineStage
from sglang_tokenweave.plan import PlanTable
from sglang_tokenweave.runtime import Model, Runtime
from sglang_tokenweave.transport import SymmetricBuffer, Transport
from sglang_tokenweave.tuning import here, tuner
from sglang_tokenweave.tuning.live import Live
from sglang_tokenweave.tuning.measure import NotMeasurableError
from sglang_tokenweave.tuning.nodes import TableError
from sglang_tokenweave.tuning.rows import plan_table
from sglang_tokenweave.tuning.table import LEAST_SMS, Key
from sglang_tokenweave.tuning.tuner import Tuned

logger = logging.getLogger(__name__)

NOMINAL_SMS = 132  # of an H100 or H200: plans made on a CPU are those of such a GPU


class RefusedError(RuntimeError):
    """A strict server asked for something that cannot be active."""


@dataclass
class State:
    """What became of TokenWeave in this process."""

    config: TokenWeaveConfig = field(default_factory=TokenWeaveConfig)
    runtime: Runtime | None = None
    reasons: tuple[str, ...] = ()  # why it does not weave
    notes: tuple[str, ...] = ()  # what else is not active
    tuned: Tuned | None = None  # the table that it plans with; None: the thresholds
    live: Live | None = None  # compares batches with stock
    model: str = ""
    on_cpu: bool = False
    rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    @property
    def is_active(self) -> bool:
        return self.runtime is not None and self.runtime.is_active


state = State()


def set_missing_hooks(missing: Mapping[str, Sequence[str]]) -> None:
    """Take note of hooks that did not take, by their role."""
    state.reasons = tuple(missing.get("weave", ()))
    state.notes = tuple(
        text for role, texts in missing.items() if role != "weave" for text in texts
    )
    for problem in (*state.reasons, *state.notes):
        logger.warning("TokenWeave: %s", problem)


def after_load_model(result: None, model_runner: Any) -> None:
    """Decide, allocate and install (AFTER hook on `ModelRunner.load_model`).

    Raises:
        RefusedError: the server is strict and this model or this setting cannot be woven.
        DisagreementError: the ranks were given different tables.
    """
    if model_runner.is_draft_worker:
        return
    state.config = TokenWeaveConfig.from_environment()
    state.model = type(model_runner.model).__name__
    state.on_cpu = model_runner.device == "cpu"
    seam_problems = seams.find_missing()
    if state.reasons or seam_problems:  # the same on all ranks: they run the same SGLang
        _decline((*state.reasons, *seam_problems))
        return
    group, pipeline = seams.tensor_parallel_group(), seams.pipeline_group()
    state.rank, state.tp_size = group.rank_in_group, group.world_size
    state.pp_rank, state.pp_size = pipeline.rank_in_group, pipeline.world_size
    reasons = _vote(_vote(_reasons(model_runner, group), group), pipeline)
    if reasons:
        _decline(reasons)
        return
    table = _table(model_runner, group)
    try:
        _install(model_runner, table)
    except DisagreementError as error:  # the same on all ranks
        _decline((str(error),))


def after_init_attention_backends(result: None, model_runner: Any) -> None:
    """Give each half an attention backend (AFTER hook on `init_attention_backends`).

    Raises:
        RefusedError: the server is strict and the attention backend is not supported.
    """
    runtime = state.runtime
    if runtime is None or model_runner.is_draft_worker:
        return
    names = {
        model_runner.prefill_attention_backend_str,
        model_runner.decode_attention_backend_str,
    }
    reason = refusals.attention_reason(names)
    if reason:
        _uninstall(runtime)
        _decline((reason,))
        return
    backends = [seams.new_attention_backend(model_runner) for _ in range(2)]
    can_cut = len(names) == 1 and names <= captured_decode.ATTENTION_BACKENDS
    runtime.activate((backends[0], backends[1]), cuts_captured_decodes=can_cut)
    _announce(runtime)


def after_init_cuda_graphs(result: None, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """Measure a table if one is wanted and none is there, capture graphs, guard (AFTER hook).

    The last moment before requests: whatever stock runs, its graphs included, can be timed.

    Raises:
        RefusedError: the server is strict and the table cannot be measured.
        DisagreementError: the ranks measured different tables.
    """
    runtime = state.runtime
    if runtime is None or not state.is_active or model_runner.is_draft_worker:
        return
    had_table = state.tuned is not None
    if not had_table and state.config.measures(on_cpu=state.on_cpu):
        _measure(model_runner, runtime)
    if not state.is_active:
        return
    if not state.on_cpu:
        has_new_table = state.tuned is not None and not had_table
        _capture(model_runner, runtime, has_new_table=has_new_table)
    if state.tuned is not None and state.pp_size == 1:
        ranks = runtime.model.place.group.ranks
        state.live = Live(runtime, _own_group(ranks), torch.device(model_runner.device))


def around_forward(
    original: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Compare a batch with stock now and then (AROUND hook on `ModelRunner.forward`)."""

    def run() -> Any:
        return original(runner, forward_batch, *args, **kwargs)

    if state.live is None or runner.is_draft_worker:
        return run()
    return state.live.forward(run, forward_batch)


def around_can_run_graph(original: Any, runner: Any, forward_batch: Any) -> bool:
    """Keep batches that are planned otherwise away from the stock graph (AROUND hook)."""
    runtime = state.runtime
    decided = None if runtime is None else runtime.overrides_stock_graph(forward_batch)
    return bool(original(runner, forward_batch)) if decided is None else decided


def around_execute(original: Any, runner: Any, forward_batch: Any, **kwargs: Any) -> Any:
    """Replay a graph of the weave in place of a stock one (AROUND hook on `execute`)."""
    runtime = state.runtime
    if runtime is None or not runtime.overrides_stock_graph(forward_batch):
        return original(runner, forward_batch, **kwargs)
    model, batch = runner.model_runner.model, forward_batch
    return runtime.replay(lambda: model.forward(batch.input_ids, batch.positions, batch, **kwargs))


def _reasons(model_runner: Any, group: Any) -> tuple[str, ...]:
    arguments = seams.resolved_arguments()
    reasons = refusals.find(arguments, model_facts.find(model_runner))
    device = torch.device(model_runner.device)
    transport = _transport(device)
    hosts = gather(topology.Host.this(), group.cpu_group)
    scattered = topology.reason(hosts, transport, shares_nvlink_domain=False)
    reasons += (scattered,) if scattered else ()
    num_sms = _num_sms(device)
    if num_sms - state.config.ctas < LEAST_SMS:
        reasons += (
            f"{describe('ctas')} is {state.config.ctas}; of {num_sms} SMs that leaves fewer than "
            f"{LEAST_SMS} to the computation",
        )
    return reasons + transports.reasons(
        transport,
        device,
        group.world_size,
        model_runner.dtype,
        model_runner.model_config.hf_config.hidden_size,
        [
            norm.weight.dtype
            for norm in model_facts.norms(model_runner.model)
            if hasattr(norm, "weight")
        ],
    )


def _vote(reasons: tuple[str, ...], group: Any) -> tuple[str, ...]:
    """Return the reasons of all ranks of a group: what one cannot do, none does."""
    ballots = gather(reasons, group.cpu_group)
    return tuple(dict.fromkeys(reason for ballot in ballots for reason in ballot))


def _install(model_runner: Any, table: PlanTable) -> None:
    config = state.config
    device = torch.device(model_runner.device)
    hf_config = model_runner.model_config.hf_config
    inner = model_runner.model.model
    place = PipelineStage.of(inner)
    transport, buffer = _communication(model_runner, place, table)
    architecture = architectures.ARCHITECTURES[state.model]
    model = Model(
        inner=inner,
        original=inner.forward,
        architecture=architecture,
        place=place,
        first_norm=getattr(inner.layers[inner.start_layer], architecture.input_norm),
        stages=architectures.build_stages(architecture, inner),
        layer=architectures.layer_shape(hf_config, state.tp_size),
        num_sms=_num_sms(device),
    )
    checked = _own_group(place.group.ranks) if config.check_plans else None
    state.runtime = Runtime(model, table, transport, buffer, checked)
    # On the instance: other models of this class (drafts) keep their stock forward.
    inner.forward = state.runtime.forward


def _communication(
    model_runner: Any, place: PipelineStage, table: PlanTable
) -> tuple[Transport, SymmetricBuffer]:
    """Make the transport and its buffer, with what else the table has a use for, or may get."""
    device = torch.device(model_runner.device)
    name = _transport(device)
    rows = _capacity(seams.resolved_arguments()), model_runner.model_config.hf_config.hidden_size
    make = partial(transports.create, name, device, place.group, *rows, model_runner.dtype)
    needed = {"has_copy_engines": table.needs_copy_engines, "has_one_shot": table.needs_one_shot}
    measures = state.config.measures(on_cpu=state.on_cpu) and state.pp_size == 1
    if name != "peer" or not measures or state.tuned is not None:
        return make(**needed)
    try:
        return make(has_copy_engines=True, has_one_shot=True)
    except DisagreementError as error:  # the same on all ranks
        made = make(**needed)  # which fails again if that is what cannot be made
        state.notes += (f"copy engines and the one-shot op ({error})",)
        return made


def _measure(model_runner: Any, runtime: Runtime) -> None:
    config, problem = state.config, "not measured with pipeline stages"
    if state.pp_size == 1:
        group = as_group(runtime.model.place.group.cpu_group)
        try:
            state.tuned = tuner.measure(config, _key(model_runner), group, model_runner, runtime)
        except NotMeasurableError as error:  # the same on all ranks
            problem = str(error)
    if state.tuned is not None:
        runtime.table = plan_table(state.tuned.table)
    elif config.transport == "auto" and not state.on_cpu:
        # Nobody said to weave unmeasured. SGLang's graphs may hold the op: the memory stays.
        runtime.is_active = False
        _decline((f"no tuned table: {problem}",))
    else:
        _do_without_table(problem)


def _capture(model_runner: Any, runtime: Runtime, *, has_new_table: bool) -> None:
    if has_new_table:
        try:
            capturing.capture_planned(model_runner, runtime)
        except DisagreementError as error:
            state.notes += (f"the table in SGLang's CUDA graphs ({error})",)
    problem = capturing.why_not(model_runner, runtime)
    if problem is None:
        try:
            runtime.graphs = capturing.capture_all(model_runner, runtime)
        except DisagreementError as error:
            problem = str(error)
            logger.warning("TokenWeave: no CUDA graphs of the weave: %s", error)
    if problem is not None:
        state.notes += (f"CUDA graphs of the weave ({problem})",)
    elif left := capturing.num_left_out(model_runner, runtime):
        state.notes += (f"the {left} smallest CUDA graphs of the weave (no time or memory left)",)


def _table(model_runner: Any, group: Any) -> PlanTable:
    """Return the table to plan with from now on."""
    config = state.config
    try:
        if config.has_table:
            state.tuned = tuner.find(config, _key(model_runner), as_group(group.cpu_group))
    except TableError as error:  # the same on all ranks
        _do_without_table(str(error))
    if state.tuned is not None:
        return plan_table(state.tuned.table)
    return PlanTable.from_thresholds(
        min_tokens=config.min_tokens,
        fuse_min_tokens=config.fuse_min_tokens,
        decode_min_tokens=config.decode_min_tokens,
        ctas=config.ctas,
        fuse_ctas=config.fuse_ctas,
    )


def _key(model_runner: Any) -> Key:
    device = torch.device(model_runner.device)
    return here.key_of(
        model_runner,
        device=device,
        sms=_num_sms(device),
        tp_size=state.tp_size,
        transport=_transport(device),
    )


def _do_without_table(problem: str) -> None:
    asked = state.config.tune == "force" or state.config.table
    if state.config.strict and asked:
        raise RefusedError(f"TokenWeave is strict and cannot use a tuned table: {problem}")
    state.notes += (f"tuned table: {problem}",)
    if state.rank == state.pp_rank == 0:
        logger.warning("TokenWeave plans by thresholds, without a tuned table: %s", problem)


def _transport(device: torch.device) -> str:
    config = state.config
    return transports.resolve(config.transport, device, is_measured=config.has_table)


def _own_group(ranks: Sequence[int]) -> Group:
    # Of its own: SGLang's may be in use at the same time, on another thread.
    timeout = timedelta(seconds=deadlines.PLAN_S)
    group = dist.new_group(list(ranks), timeout, "gloo", use_local_synchronization=True)
    return as_group(group, deadlines.PLAN_S)


def _uninstall(runtime: Runtime) -> None:
    del runtime.model.inner.forward
    runtime.transport.close()
    state.runtime = None


def _capacity(arguments: Mapping[str, Any]) -> int:
    """Return the rows of the largest batch that is ever planned: one chunk, or all decodes."""
    chunk = arguments["chunked_prefill_size"] or 0
    if arguments["enable_dynamic_chunking"]:
        chunk += chunk // 4  # at start SGLang times chunks up to there, to fit one model to all
    prefill = chunk if chunk > 0 else arguments["max_prefill_tokens"]
    return max(prefill, arguments["max_running_requests"] or 0, 512)


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return NOMINAL_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _decline(reasons: tuple[str, ...]) -> None:
    state.reasons = reasons
    text = "; ".join(reasons)
    if state.config.strict:
        raise RefusedError(f"TokenWeave is strict and cannot be active: {text}")
    if state.rank == state.pp_rank == 0:
        logger.warning("TokenWeave is NOT active, %s runs stock: %s", state.model, text)


def _announce(runtime: Runtime) -> None:
    if state.rank != 0:
        return
    logger.info(
        "TokenWeave ACTIVE: %s, tp=%d, %stransport=%s | %s | buffer: %d tokens%s",
        state.model,
        state.tp_size,
        f"pipeline stage {state.pp_rank + 1} of {state.pp_size}, " if state.pp_size > 1 else "",
        runtime.transport.name,
        announcement.who_decides(state.config, state.tuned, on_cpu=state.on_cpu),
        runtime.buffer.capacity,
        "".join(f" | not active: {note}" for note in state.notes),
    )
