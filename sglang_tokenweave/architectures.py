"""The models that can be woven: a row each, no copy of a model.

A row says where the parts of a decoder layer are. The parts' interfaces (`attention.forward`,
`mlp.forward`, a norm's weight and epsilon) are the same in all supported SGLang releases.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from sglang_tokenweave import partials
from sglang_tokenweave.waves import LayerShape, transformer_layer
from sglang_tokenweave.weave import Stage


@dataclass(frozen=True)
class Architecture:
    """Names of a decoder layer's parts."""

    feed_forward: str = "mlp"
    attention: str = "self_attn"
    input_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"
    # Attribute of the feed-forward part that guards an all-reduce of its own (Mixtral <= 0.5.21).
    reduces_if_above_one: str | None = None


_PLAIN = Architecture()
ARCHITECTURES = {
    "LlamaForCausalLM": _PLAIN,
    "MistralForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": _PLAIN,
    "Qwen3ForCausalLM": _PLAIN,
    "Qwen2MoeForCausalLM": _PLAIN,
    "Qwen3MoeForCausalLM": _PLAIN,
    "MixtralForCausalLM": Architecture(
        feed_forward="block_sparse_moe", reduces_if_above_one="tp_size"
    ),
}


def build_stages(architecture: Architecture, inner: Any) -> tuple[Stage, ...]:
    """Return the stages of `inner` (SGLang's `XModel`) and redirect its projections.

    The embedding is one of them where the pipeline begins: its sum over the ranks is hidden, too.
    """
    layers = list(inner.layers[inner.start_layer : inner.end_layer])
    stages = []
    if inner.pp_group.is_first_rank:
        first = getattr(layers[0], architecture.input_norm)
        embedding = partials.embedding(inner.embed_tokens)
        stages.append(Stage(embedding, first.weight, first.variance_epsilon))
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        attention = getattr(layer, architecture.attention)
        feed_forward = getattr(layer, architecture.feed_forward)
        partials.redirect(attention.o_proj)
        if hasattr(feed_forward, "down_proj"):  # dense; experts sum into a tensor of their own
            partials.redirect(feed_forward.down_proj)
        middle = getattr(layer, architecture.post_attention_norm)
        stages.append(Stage(partials.attention(attention), middle.weight, middle.variance_epsilon))
        computation = partials.feed_forward(feed_forward)
        if following is None and not inner.pp_group.is_last_rank:
            stages.append(Stage(computation, weight=None))
            continue
        after = getattr(following, architecture.input_norm) if following else inner.norm
        stages.append(Stage(computation, after.weight, after.variance_epsilon))
    return tuple(stages)


def norms(architecture: Architecture, inner: Any) -> list[Any]:
    """Return all RMSNorm modules that the woven loop replaces."""
    layers = inner.layers[inner.start_layer : inner.end_layer]
    names = (architecture.input_norm, architecture.post_attention_norm)
    last = [inner.norm] if inner.pp_group.is_last_rank else []
    return [*(getattr(layer, name) for layer in layers for name in names), *last]


@contextmanager
def own_reductions_left_out(architecture: Architecture, inner: Any) -> Iterator[None]:
    """Keep feed-forward parts from an all-reduce that SGLang's own flag does not reach."""
    guard = architecture.reduces_if_above_one
    with ExitStack() as stack:
        if guard:
            for layer in inner.layers[inner.start_layer : inner.end_layer]:
                module = getattr(layer, architecture.feed_forward)
                stack.callback(setattr, module, guard, getattr(module, guard))
                setattr(module, guard, 1)
        yield


def layer_sizes(config: Any) -> dict[str, int]:
    """Return the sizes of one decoder layer, from the model's configuration.

    By name: hidden, heads, kv_heads, head_dim, intermediate (of one expert, if there are several),
    experts (1: a dense model) and top_k.
    """
    heads = config.num_attention_heads
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    expert_width = getattr(config, "moe_intermediate_size", None) if experts else None
    return {
        "hidden": config.hidden_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", heads),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "intermediate": expert_width or config.intermediate_size,
        "experts": experts or 1,
        "top_k": config.num_experts_per_tok if experts else 1,
    }


def layer_shape(config: Any, world_size: int) -> LayerShape:
    """Return the GEMMs of one decoder layer on one rank, from the model's configuration."""
    return transformer_layer(**layer_sizes(config), world_size=world_size)
