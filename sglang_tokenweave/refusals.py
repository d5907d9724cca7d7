"""What is not woven yet, each by name: such a server runs stock and says why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ATTENTION_BACKENDS = frozenset(
    {"fa3", "fa4", "flashinfer", "triton", "trtllm_mha", "torch_native", "intel_amx"}
)
# Of those, the ones that a woven CUDA graph may hold, see captured_attention.py; and the ones that
# do so where layers look back on a window: the others need metadata of their own for that.
GRAPH_ATTENTION_BACKENDS = frozenset({"fa3", "flashinfer", "triton"})
GRAPH_WINDOW_BACKENDS = frozenset({"fa3"})


@dataclass(frozen=True)
class ModelFacts:
    """What the decision needs to know of the loaded model."""

    architecture: str  # class name, as in the model's config.json
    is_supported: bool
    is_multimodal: bool = False
    is_mla: bool = False
    captures_layers: bool = False
    has_plain_norms: bool = True
    has_megakernel: bool = False


@dataclass(frozen=True)
class Rule:
    """A server argument that excludes weaving, the values that do, and what it is called."""

    argument: str
    excludes: Callable[[Any], bool]
    feature: str


def _is_set(value: Any) -> bool:
    return bool(value) and value != "none"


def _above_one(value: Any) -> bool:
    return value is not None and value > 1


RULES = (
    Rule("enable_lora", _is_set, "LoRA"),
    Rule("lora_paths", _is_set, "LoRA"),
    Rule("enable_dp_attention", _is_set, "data-parallel attention"),
    Rule("speculative_algorithm", _is_set, "speculative decoding"),
    Rule("ep_size", _above_one, "expert parallelism"),
    Rule("moe_a2a_backend", _is_set, "all-to-all expert dispatch"),
    Rule("attn_cp_size", _above_one, "context parallelism"),
    Rule("dcp_size", _above_one, "decode context parallelism"),
    Rule("enable_torch_compile", _is_set, "torch.compile"),
    Rule("enable_deterministic_inference", _is_set, "deterministic inference"),
    Rule("rl_on_policy_target", _is_set, "on-policy RL numerics"),
    Rule("enable_two_batch_overlap", _is_set, "two-batch overlap"),
    Rule("enable_single_batch_overlap", _is_set, "single-batch overlap"),
    Rule("enable_eplb", _is_set, "expert load balancing"),
    Rule("expert_distribution_recorder_mode", _is_set, "recording of expert distributions"),
    Rule("enable_layernorm_sp", _is_set, "sequence-parallel LayerNorm"),
    Rule("enable_attn_tp_input_scattered", _is_set, "scattered attention inputs"),
    Rule("enable_quant_communications", _is_set, "quantized communication"),
    Rule("enable_pdmux", _is_set, "prefill/decode multiplexing"),
    Rule("enable_unified_memory", _is_set, "unified KV memory"),
    Rule("enable_memory_saver", _is_set, "memory saver"),
    Rule("enable_nvidia_megakernel", _is_set, "megakernel"),
    Rule("dllm_algorithm", _is_set, "diffusion language models"),
)


def find(arguments: Mapping[str, Any], model: ModelFacts) -> tuple[str, ...]:
    """Return every reason against weaving; empty when there is none.

    Args:
        arguments: SGLang's server arguments by field name, after its own resolution.
        model: the loaded model.
    """
    reasons = []
    if arguments["tp_size"] == 1:
        reasons.append("tensor parallel size is 1: there is no communication to hide")
    # `lora_paths` implies `enable_lora`: a feature is named once.
    features = {rule.feature: None for rule in RULES if rule.excludes(arguments.get(rule.argument))}
    reasons += [f"not supported with {feature}" for feature in features]
    return (*reasons, *_model_reasons(model))


def launch_reason(arguments: Any) -> str | None:
    """Return why the workers of this server would not even load this extension, or None.

    Args:
        arguments: SGLang's ServerArgs, as given.
    """
    if not getattr(arguments, "use_ray", False):
        return None
    return "not supported with Ray (--use-ray), whose workers do not load SGLang's plugins"


def _model_reasons(model: ModelFacts) -> list[str]:
    reasons = []
    if model.is_mla:
        reasons.append("not supported with MLA attention")
    if model.is_multimodal:
        reasons.append("not supported with multimodal models")
    if not model.is_supported:
        reasons.append(f"architecture {model.architecture} is not supported")
    if model.captures_layers:
        reasons.append("not supported with capture of layers' hidden states")
    if not model.has_plain_norms:
        reasons.append("not supported with RMSNorm variants (float32 residual, partial variance)")
    if model.has_megakernel:
        reasons.append("not supported with megakernel")
    return reasons


def attention_reason(backends: set[str]) -> str | None:
    """Return why these attention backends cannot serve two halves, or None."""
    unknown = sorted(backends - ATTENTION_BACKENDS)
    if not unknown:
        return None
    allowed = ", ".join(sorted(ATTENTION_BACKENDS))
    return f"attention backend {', '.join(unknown)} is not supported; supported: {allowed}"


def graph_reason(backend: str, *, has_windows: bool) -> str | None:
    """Return why a CUDA graph cannot hold a woven forward with this attention backend, or None."""
    allowed = GRAPH_WINDOW_BACKENDS if has_windows else GRAPH_ATTENTION_BACKENDS
    if backend in allowed:
        return None
    model = "a model with sliding windows" if has_windows else "this model"
    names = ", ".join(sorted(allowed))
    return f"attention backend {backend} is not captured with {model}; captured: {names}"
