"""Shapes of models to time with random weights: Hugging Face's configuration, no checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPE = "bfloat16"
WORD = " w7"  # a token of a shape's tokenizer


@dataclass(frozen=True)
class Shape:
    """A model's configuration, all but the number of layers."""

    architecture: str  # SGLang's class
    model_type: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128
    layers: int = 8  # of several servers side by side, unless told otherwise
    extra: tuple[tuple[str, Any], ...] = ()

    def config(self, layers: int) -> dict[str, Any]:
        """Return config.json."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_hidden_layers": layers,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": DTYPE,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **dict(self.extra),
        }


def _llama(hidden: int, intermediate: int, heads: int, kv_heads: int) -> Shape:
    return Shape("LlamaForCausalLM", "llama", hidden, intermediate, heads, kv_heads, 128256)


SHAPES = {
    # Each of two GPUs does the work of one of eight: the paper's compute-to-communication ratio.
    "tp8rank": _llama(8192, 7168, 16, 2),
    "llama-3-8b": _llama(4096, 14336, 32, 8),
    "llama-3.3-70b": _llama(8192, 28672, 64, 8),
    "qwen2.5-72b": Shape("Qwen2ForCausalLM", "qwen2", 8192, 29568, 64, 8, 152064),
    "mixtral-8x22b": Shape(
        *("MixtralForCausalLM", "mixtral", 6144, 16384, 48, 8, 32768),
        layers=4,  # ten gigabytes on each of two GPUs, for each server
        extra=(("num_local_experts", 8), ("num_experts_per_tok", 2)),
    ),
    "qwen3-8b": Shape("Qwen3ForCausalLM", "qwen3", 4096, 12288, 32, 8, 151936),
    "qwen3-30b-a3b": Shape(
        *("Qwen3MoeForCausalLM", "qwen3_moe", 2048, 6144, 32, 4, 151936),
        extra=(
            *(("num_experts", 128), ("num_experts_per_tok", 8), ("moe_intermediate_size", 768)),
            *(("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])),
        ),
    ),
    "smoke": Shape("LlamaForCausalLM", "llama", 256, 512, 8, 4, 1024, head_dim=32),
}


def write(name: str, layers: int, folder: Path) -> Path:
    """Write the model's folder, a configuration alone, and return it."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(SHAPES[name].config(layers), indent=1))
    return path


def write_tokenizer(name: str, folder: Path) -> None:
    """Write a tokenizer of the model's whole vocabulary, in which every token is a word.

    SGLang's client takes the first text that it is sent for the first token.
    """
    # Not needed for the models alone, and slow to import.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{token}": token for token in range(SHAPES[name].vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    fast.save_pretrained(str(folder))
