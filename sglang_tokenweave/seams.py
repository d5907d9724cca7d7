"""What we use of SGLang beyond the hooks: probed by feature once, called through here.

The releases differ in places; nothing outside this file knows which one is installed.
"""

import gc
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch

_SRT = "sglang.srt."


def find_missing() -> list[str]:
    """Return the features that weaving needs and this SGLang lacks, each by name."""
    problems = [_probe_object(path) for path in _NEEDED_OBJECTS]
    problems += [_probe_parameters(path, wanted) for path, wanted in _NEEDED_PARAMETERS]
    return [problem for problem in problems if problem]


_NEEDED_OBJECTS = (
    "runtime_context:get_parallel",
    "runtime_context:get_context",
    "runtime_context:get_forward",
    "model_executor.forward_batch_info:ForwardBatch",
    "model_executor.forward_batch_info:PPProxyTensors",
    "model_executor.model_runner:ModelRunner._get_attention_backend",
    "layers.moe.utils:should_skip_mlp_all_reduce",
    "layers.vocab_parallel_embedding:VocabParallelEmbedding._embed_local_shard",
)
_NEEDED_PARAMETERS = (
    ("layers.linear:RowParallelLinear.forward", ("output_tensor", "skip_all_reduce")),
    ("model_executor.forward_context:forward_context", ("ctx",)),
    ("model_executor.forward_context:get_forward_context", ()),
)


def _resolve(path: str) -> Any:
    module, _, names = path.partition(":")
    found: Any = importlib.import_module(_SRT + module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def _probe_object(path: str) -> str | None:
    try:
        _resolve(path)
    except (ImportError, AttributeError) as error:
        return f"SGLang has no {_SRT}{path.replace(':', '.')} ({error})"
    return None


def _probe_parameters(path: str, wanted: tuple[str, ...]) -> str | None:
    problem = _probe_object(path)
    if problem:
        return problem
    missing = [name for name in wanted if name not in inspect.signature(_resolve(path)).parameters]
    return f"{_SRT}{path.replace(':', '.')} lacks {', '.join(missing)}" if missing else None


def tensor_parallel_group() -> Any:
    """Return SGLang's GroupCoordinator of the tensor-parallel ranks."""
    return _resolve("runtime_context:get_parallel")().tp_group


def pipeline_group() -> Any:
    """Return SGLang's GroupCoordinator of the same rank in all pipeline stages."""
    return _resolve("runtime_context:get_parallel")().pp_group


def pipeline_proxy(hidden_states: torch.Tensor, residual: torch.Tensor) -> Any:
    """Return what a pipeline stage hands over, as SGLang's forward does."""
    proxy = _resolve("model_executor.forward_batch_info:PPProxyTensors")
    return proxy({"hidden_states": hidden_states, "residual": residual})


def resolved_arguments() -> dict[str, Any]:
    """Return SGLang's server arguments after its own defaults and overrides."""
    arguments = _resolve("runtime_context:get_context")().resolved_server_args_dict()
    return dict(arguments)


def partial_sums() -> Any:
    """Return a context in which SGLang's projections and experts leave their sums to the caller."""
    return _resolve("runtime_context:get_forward")().scoped(mlp_reduce_scatter=True)


def partial_embedding(module: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Return what a rank adds to the embeddings of tokens: its part of the vocabulary, or zeros."""
    if getattr(module, "tp_size", 1) > 1:
        part: torch.Tensor = module._embed_local_shard(input_ids)
        return part
    rows: torch.Tensor = module(input_ids)  # every rank has the whole vocabulary
    return rows if tensor_parallel_group().rank_in_group == 0 else torch.zeros_like(rows)


def attention_context(backend: Any, batch: Any) -> Any:
    """Return a context in which attention uses `backend`, which holds the metadata of `batch`."""
    module, takes_batch = _forward_context()
    context = replace(module.get_forward_context(), attn_backend=backend)
    extra = {"forward_batch": batch} if takes_batch else {}
    return module.forward_context(context, **extra)


@cache
def _forward_context() -> tuple[Any, bool]:
    module = importlib.import_module(_SRT + "model_executor.forward_context")
    # From 0.5.23 the context also tells experts how many rows of the batch are real.
    return module, "forward_batch" in inspect.signature(module.forward_context).parameters


def new_attention_backend(model_runner: Any) -> Any:
    """Create one more attention backend like the runner's own, with metadata of its own."""
    backend = model_runner._get_attention_backend()
    translator = getattr(model_runner, "kv_index_translator", None)
    if translator is not None:
        translator.bind_and_verify_backends([backend])
    return backend


def forward_batch(model_runner: Any, *, is_decode: bool, num_tokens: int, **values: Any) -> Any:
    """Return a ForwardBatch of prompts or of decoding requests that asks for nothing special."""
    module = "model_executor.forward_batch_info:"
    modes, batch_type = _resolve(module + "ForwardMode"), _resolve(module + "ForwardBatch")
    mode = modes.DECODE if is_decode else modes.EXTEND
    for name in ("num_token_non_padded_cpu", "global_num_token_non_padded_cpu"):  # from 0.5.21
        if name in {field.name for field in fields(batch_type)}:
            values[name] = num_tokens
    batch = batch_type(
        forward_mode=mode,
        global_forward_mode=mode,
        return_logprob=False,
        spec_algorithm=model_runner.spec_algorithm,
        capture_hidden_mode=_resolve(module + "CaptureHiddenMode").NULL,
        **values,
    )
    # From 0.5.23 the KV slots of a batch are bound before it runs.
    bind = getattr(getattr(model_runner, "kv_index_translator", None), "bind_runner_slots", None)
    if bind is not None:
        bind(batch)
    return batch


def next_token_logits(output: Any) -> torch.Tensor:
    """Return the logits `[requests, vocabulary]` of what `ModelRunner.forward` returned."""
    logits: torch.Tensor = output.logits_output.next_token_logits
    return logits


def attention_backend() -> Any:
    """Return the attention backend of the forward pass under way."""
    module, _ = _forward_context()
    return module.get_attn_backend()


def forward_context(model_runner: Any) -> Any:
    """Return the context of a forward pass outside of any, as SGLang's runners make it."""
    module, _ = _forward_context()
    return module.forward_context(module.ForwardContext(attn_backend=model_runner.attn_backend))


# What SGLang's runners of CUDA graphs call the list of sizes that they capture.
PREFILL_SIZES = "capture_num_tokens"
DECODE_SIZES = "capture_bs"
_GRAPH_RUNNERS = (
    "model_executor.runner.prefill_cuda_graph_runner",
    "model_executor.runner.decode_cuda_graph_runner",
)


def graph_sizes(model_runner: Any) -> tuple[int, ...]:
    """Return the tokens that SGLang's own prefill graphs are for; empty if it has none."""
    return tuple(getattr(model_runner.prefill_cuda_graph_runner, PREFILL_SIZES, ()))


def decode_graph_sizes(model_runner: Any) -> tuple[int, ...]:
    """Return the requests that SGLang's own decode graphs are for; empty if it has none."""
    runner = getattr(model_runner, "decode_cuda_graph_runner", None)
    return tuple(getattr(runner, DECODE_SIZES, ()))


def graph_pool() -> Any:
    """Return the memory pool of SGLang's graphs: one graph runs at a time, so ours share it."""
    pool = "model_executor.runner_utils.pool:get_or_create_global_graph_memory_pool"
    return _resolve(pool)(torch.cuda)


def capture_mode() -> Any:
    """Return the context in which SGLang captures its decode graphs."""
    return _resolve("model_executor.runner_utils.capture_mode:model_capture_mode")()


@contextmanager
def few_collections() -> Iterator[None]:
    """Leave what there is now out of garbage collections, so that captures are not held up.

    For each `capture` SGLang freezes all objects, so that few are looked at meanwhile, and looks at
    all of them before and after: 0.3 s each, where capturing eight layers takes 0.1.
    """
    runners: list[Any] = [sys.modules.get(_SRT + name) for name in _GRAPH_RUNNERS]
    freezing = {
        runner: runner.freeze_gc
        for runner in runners
        if getattr(runner, "freeze_gc", _frozen_already) is not _frozen_already
    }
    gc.collect()
    gc.freeze()
    for runner in freezing:
        runner.freeze_gc = _frozen_already
    try:
        yield
    finally:
        for runner, freeze in freezing.items():
            runner.freeze_gc = freeze
        gc.unfreeze()
        gc.collect()


@contextmanager
def _frozen_already(*_: Any) -> Iterator[None]:
    gc.collect()  # of what came since: no graph may be destroyed while another is captured
    yield


def has_sliding_window_cache(model_runner: Any) -> bool:
    """Whether some layers keep the last tokens' keys and values only, in a pool of their own."""
    return bool(getattr(model_runner.attn_backend, "use_sliding_window_kv_pool", False))


def captured_attention_backend(model_runner: Any) -> Any:
    """Create an attention backend of prompts whose calls are captured in CUDA graphs."""
    backend = new_attention_backend(model_runner)
    if isinstance(backend, _resolve("layers.attention.hybrid_attn_backend:HybridAttnBackend")):
        backend = backend.prefill_backend
    return without_splits_of_keys(backend)


def kv_indices_kernel() -> Any:
    """Return SGLang's Triton kernel that lists the KV slots of several requests."""
    name = "create_flashinfer_kv_indices_triton"
    places = ("attention", "kvcache")  # the second before 0.5.23
    modules = [f"sglang.kernels.ops.{place}.kv_indices" for place in places]
    found = next(module for module in modules if importlib.util.find_spec(module) is not None)
    return getattr(importlib.import_module(found), name)


def has_sliding_windows(model_runner: Any) -> bool:
    """Whether some layers look back on the last tokens only."""
    return model_runner.sliding_window_size is not None


def without_splits_of_keys(backend: Any) -> Any:
    """Return a backend for captures that works on all keys of a request at once.

    FA3 would split them by the longest request there can be, not by those there are: twice as slow
    where heads are few.
    """
    for name in ("num_splits", "decode_num_splits"):  # the second from 0.5.23
        if hasattr(backend, name):
            setattr(backend, name, 1)
    return backend


def graph_owns_forward() -> bool:
    """Whether a CUDA graph is being captured or a prefill graph runner drives this call.

    There a prefill's attention takes its batch from the runner and not from us: it may not be cut.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True
    return any(probe() for probe in _probes(*_CAPTURES, *_GRAPHS_IN_PIECES))


def graph_is_in_pieces() -> bool:
    """Whether what is captured or replayed now is a graph between two calls of attention, or so."""
    return any(probe() for probe in _probes(*_GRAPHS_IN_PIECES))


_CAPTURES = (
    "model_executor.runner_utils.capture_mode:get_is_capture_mode",  # its warm-ups too
    "model_executor.runner_utils.prefill_graph:is_in_prefill_graph_scope",  # from 0.5.23
)
_BACKENDS = "model_executor.runner_backend_utils."
_GRAPHS_IN_PIECES = (
    _BACKENDS + "breakable_cuda_graph.context:is_in_breakable_cuda_graph",
    _BACKENDS + "tc_piecewise_cuda_graph.context_manager:get_tc_piecewise_forward_context",
)


@cache
def _probes(*paths: str) -> tuple[Callable[[], Any], ...]:
    return tuple(_resolve(path) for path in paths if _probe_object(path) is None)
