"""Write a tiny random model with its tokenizer to disk, so that a server starts with no download.

`python -m sglang_tokenweave.tiny_model llama OUT_DIR` makes one by hand; the demo and the tests
call `make_tiny_model`. The weights are random but fixed, the text they generate means nothing.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

DTYPES = ("float32", "bfloat16", "float16")

_SEED = 0
# Spreads the logits so far that greedy decoding meets no near ties: then equal tokens mean equal
# arithmetic, and a rounding difference does not change the text.
_WEIGHT_STD = 0.08
# Norm weights and biases differ from 1 and 0, so that code which forgets one gives other tokens.
_VECTOR_STD = 0.1

_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"  # in this order they get the ids 0, 1 and 2
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# fmt: off
_WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "seven", "wizards",
    "mix", "potions", "and", "count", "apples", "in", "rain", "near", "old", "mill",
]
# fmt: on
_CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)

# Every size divides by 4, so the model runs at TP = 1, 2 and 4.
_COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    **_TOKEN_IDS,
}
_QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_QWEN_EXPERTS, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {**_QWEN_EXPERTS, "head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",  # SGLang reads this name, transformers another
    },
}
ARCHITECTURES = tuple(_SPECIFIC)


def make_tiny_model(arch: str, out: Path, dtype: str = "float32", **config_overrides: Any) -> Path:
    """Write a model of `arch` to the folder `out`, unless it is already there, and return `out`.

    Two processes may make the same one at once. `config_overrides` replace fields of the model's
    Hugging Face configuration, for example `num_hidden_layers=2`.

    Raises:
        ValueError: `arch` or `dtype` is unknown, or `out` holds something else.
    """
    if arch not in _SPECIFIC:
        raise ValueError(f"architecture {arch!r}: known are {', '.join(ARCHITECTURES)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: known are {', '.join(DTYPES)}")
    config = {**_COMMON, **_SPECIFIC[arch], **config_overrides}
    recipe = {"arch": arch, "dtype": dtype, "config": config, "seed": _SEED, "std": _WEIGHT_STD}
    if not _holds(out, recipe):
        out.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system as `out`: then one rename publishes the finished folder.
        scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            _save_model(arch, config, dtype, scratch)
            _tokenizer().save_pretrained(scratch)
            # Written last and whole: no sampling defaults that a test would have to undo.
            (scratch / "generation_config.json").write_text(json.dumps(_TOKEN_IDS))
            _recipe_file(scratch).write_text(json.dumps(recipe, indent=1))
            _publish(scratch, out, recipe)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return out


def _holds(out: Path, recipe: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    found = _recipe_file(out)
    # Through JSON, as the file went: tuples become lists.
    if found.is_file() and json.loads(found.read_text()) == json.loads(json.dumps(recipe)):
        return True
    raise ValueError(f"{out} exists and is not the model asked for: remove it or name another")


def _recipe_file(folder: Path) -> Path:
    return folder / "tiny_model.json"


def _publish(scratch: Path, out: Path, recipe: dict[str, Any]) -> None:
    scratch.chmod(0o755)  # mkdtemp's folders are private
    try:
        os.rename(scratch, out)
    except OSError:
        # Another process was first: success if it made the same model.
        if not _holds(out, recipe):
            raise


def _save_model(arch: str, config: dict[str, Any], dtype: str, out: Path) -> None:
    generator = torch.Generator().manual_seed(_SEED)
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_config(AutoConfig.for_model(arch, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, _WEIGHT_STD, generator=generator)
            else:  # added to what the architecture starts with: 1, or 0 for Gemma's norms
                parameter.add_(torch.randn(parameter.shape, generator=generator) * _VECTOR_STD)
    model.to(getattr(torch, dtype)).save_pretrained(out)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on random sentences of `_WORDS`: about one token per word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(_SEED)
    sentences = (" ".join(draw.choices(_WORDS, k=40)) for _ in range(200))
    tokenizer.train_from_iterator(sentences, trainer)
    untyped: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = untyped(
        tokenizer_object=tokenizer, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def main(argv: list[str] | None = None) -> None:
    """Make the model that the command line names, and print its folder."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_tokenweave.tiny_model", description=make_tiny_model.__doc__
    )
    parser.add_argument("arch", choices=ARCHITECTURES)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args(argv)
    out = make_tiny_model(arguments.arch, arguments.out_dir, arguments.dtype)
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()
