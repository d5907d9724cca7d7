"""Decide at load whether this model is woven, and put the woven forward in place if it is."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sglang_tokenweave import architectures, deadlines, refusals, seams, topology, transports
from sglang_tokenweave.agreement import DisagreementError, Group, as_group, gather, step
from sglang_tokenweave.config import TokenWeaveConfig, describe
from sglang_tokenweave.pipeline import PipelineStage
from sglang_tokenweave.plan import Kind, PlanTable
from sglang_tokenweave.refusals import ModelFacts
from sglang_tokenweave.runtime import Model, Runtime
from sglang_tokenweave.split import UnsplittableError

logger = logging.getLogger(__name__)

# Options of SGLang's RMSNorm that change what it computes.
_NORM_VARIANTS = (
    "fp32_residual",
    "override_orig_dtype",
    "variance_size_override",
    "cast_x_before_out_mul",
)
LEAST_SMS = 16  # below that a GEMM beside the communication would be the slower of the two
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
    model: str = ""
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
    """
    if model_runner.is_draft_worker:
        return
    state.config = TokenWeaveConfig.from_environment()
    state.model = type(model_runner.model).__name__
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
    try:
        _install(model_runner)
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
    runtime.activate((backends[0], backends[1]))
    _announce(runtime)


def after_init_cuda_graphs(result: None, model_runner: Any, *_: Any, **__: Any) -> None:
    """Capture the woven forward beside SGLang's own graphs (AFTER hook on `init_cuda_graphs`)."""
    runtime = state.runtime
    if runtime is None or not runtime.is_active or model_runner.is_draft_worker:
        return
    sizes = runtime.sizes_to_capture(seams.graph_sizes(model_runner))
    reason = refusals.graph_reason(model_runner.prefill_attention_backend_str)
    if not runtime.model.place.is_whole:
        reason = "not with a pipeline"
    if not sizes or reason:
        state.notes += (f"CUDA graphs of the weave ({reason or 'stock prefill has none'})",)
        return
    free_bytes, began = torch.cuda.mem_get_info()[0], time.perf_counter()

    def capture() -> None:
        try:
            backends = [seams.captured_attention_backend(model_runner) for _ in range(2)]
            with seams.forward_context(model_runner):
                runtime.capture(sizes, backends)
        except Exception as error:  # of kernels, allocators and backends alike: weave without
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    try:
        step("capturing", runtime.model.place.group.cpu_group, capture)
    except DisagreementError as error:
        runtime.graphs = None
        state.notes += (f"CUDA graphs of the weave ({error})",)
        logger.warning("TokenWeave: no CUDA graphs of the weave: %s", error)
        return
    if state.rank == 0:
        logger.info(
            "TokenWeave captured %d CUDA graphs of up to %d tokens in %.1f s, %.2f GiB",
            len(sizes),
            sizes[-1],
            time.perf_counter() - began,
            (free_bytes - torch.cuda.mem_get_info()[0]) / 2**30,
        )


def around_can_run_graph(original: Any, runner: Any, forward_batch: Any) -> bool:
    """Keep batches that are planned otherwise away from the stock graph (AROUND hook)."""
    runtime = state.runtime
    try:
        planned = runtime.plan(forward_batch) if runtime else None
    except UnsplittableError:
        planned = None
    # Stock's graph of a size that is fused holds the fused op.
    if planned is not None and planned[1].kind is Kind.WEAVE:
        return False
    return bool(original(runner, forward_batch))


def _reasons(model_runner: Any, group: Any) -> tuple[str, ...]:
    arguments = seams.resolved_arguments()
    reasons = refusals.find(arguments, _facts(model_runner))
    device = torch.device(model_runner.device)
    transport = transports.resolve(state.config.transport, device)
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
        [norm.weight.dtype for norm in _norms(model_runner.model) if hasattr(norm, "weight")],
    )


def _norms(model: Any) -> list[Any]:
    architecture = architectures.ARCHITECTURES.get(type(model).__name__)
    inner = getattr(model, "model", None)
    return architectures.norms(architecture, inner) if architecture else []


def _facts(model_runner: Any) -> ModelFacts:
    model, config = model_runner.model, model_runner.model_config
    architecture = architectures.ARCHITECTURES.get(type(model).__name__)
    inner = getattr(model, "model", None)
    return ModelFacts(
        architecture=type(model).__name__,
        is_supported=architecture is not None,
        is_multimodal=config.is_multimodal,
        is_mla=config.attention_arch.name == "MLA",
        captures_layers=bool(getattr(inner, "layers_to_capture", ())),
        has_plain_norms=all(_is_plain(norm) for norm in _norms(model)),
        has_megakernel="_megakernel" in vars(model),
    )


def _is_plain(norm: Any) -> bool:
    return not any(getattr(norm, name, None) for name in _NORM_VARIANTS)


def _vote(reasons: tuple[str, ...], group: Any) -> tuple[str, ...]:
    """Return the reasons of all ranks of a group: what one cannot do, none does."""
    ballots = gather(reasons, group.cpu_group)
    return tuple(dict.fromkeys(reason for ballot in ballots for reason in ballot))


def _install(model_runner: Any) -> None:
    config = state.config
    device = torch.device(model_runner.device)
    hf_config = model_runner.model_config.hf_config
    inner = model_runner.model.model
    place = PipelineStage.of(inner)
    name = transports.resolve(config.transport, device)
    transport = transports.create(name, device, place.group, engine=config.engine)
    capacity = _capacity(seams.resolved_arguments())
    try:
        buffer = transport.allocate(capacity, hf_config.hidden_size, model_runner.dtype)
    except DisagreementError:
        transport.close()
        raise
    table = PlanTable.from_thresholds(
        min_tokens=config.min_tokens,
        fuse_min_tokens=config.fuse_min_tokens,
        decode_min_tokens=config.decode_min_tokens,
        ctas=config.ctas,
        fuse_ctas=config.fuse_ctas,
    )
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
    checked = _checking_group(place.group.ranks) if config.check_plans else None
    state.runtime = Runtime(model, table, transport, buffer, checked)
    # On the instance: other models of this class (drafts) keep their stock forward.
    inner.forward = state.runtime.forward


def _checking_group(ranks: Sequence[int]) -> Group:
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
    config = state.config
    fuse = f">= {config.fuse_min_tokens} tokens" if config.fuse_min_tokens else "off"
    decode = f">= {config.decode_min_tokens} requests" if config.decode_min_tokens else "off"
    logger.info(
        "TokenWeave ACTIVE: %s, tp=%d, %stransport=%s | prefill woven: >= %d tokens | "
        "fused unsplit: %s | decode woven: %s | buffer: %d tokens%s",
        state.model,
        state.tp_size,
        f"pipeline stage {state.pp_rank + 1} of {state.pp_size}, " if state.pp_size > 1 else "",
        runtime.transport.name,
        config.min_tokens,
        fuse,
        decode,
        runtime.buffer.capacity,
        "".join(f" | not active: {note}" for note in state.notes),
    )
