"""Train the demo model: `.venv/bin/python -m launch.train_demo OUT_DIR`, half an hour on one core.

A small Llama that reads bytes learns the standard library's sources. Interrupted, the same command
goes on from the last checkpoint. It writes the model with its tokenizer (bfloat16), and the losses
as `training.json`; `python -m launch.plot_training` draws them.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch.stdlib_text import module_files

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "train_demo"
_SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]  # ids 0, 1, 2; the bytes follow
# It was never taught to chat, so it is shown the messages' text alone, and goes on from there.
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{{ '' if loop.last else '\\n' }}{% endfor %}"
)
# Every size divides by 4, so the model runs at TP = 1, 2 and 4.
_SHAPE: dict[str, Any] = {
    "vocab_size": 264,  # 259 in use
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EVERY = 60  # steps from one checkpoint and held-out loss to the next


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside the text. The last steps see windows of full length."""

    steps: int = 1200
    tokens_per_step: int = 2048
    window: int = 512
    last_window: int = 2048
    last_share: float = 0.5
    matrix_lr: float = 0.02
    other_lr: float = 0.004
    warmup_steps: int = 40
    seed: int = 0

    def window_at(self, step: int) -> int:
        """Return how many tokens in a row one sample of a step has."""
        return self.window if step < self.steps * (1 - self.last_share) else self.last_window

    def lr_factor(self, step: int) -> float:
        """Rise linearly to 1, then fall along a cosine to 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Training:
    """Model, optimizers and losses so far: all that a checkpoint holds."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.step = 0
        self.losses: list[dict[str, float]] = []
        self.model = LlamaForCausalLM(LlamaConfig(**_SHAPE))
        matrices = [p for p in self.model.model.layers.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        # Muon needs about half the tokens that AdamW needs, and tokens are dear on a CPU.
        self.optimizers = [
            torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def advance(self, tokens: torch.Tensor) -> float:
        """Take one step on random windows of `tokens` and return its loss, in nats a token."""
        recipe, rows = self.recipe, self.recipe.window_at(self.step)
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        starts = torch.randint(
            len(tokens) - rows, (recipe.tokens_per_step // rows,), generator=draw
        )
        loss = self._loss(torch.stack([tokens[at : at + rows + 1] for at in starts.tolist()]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, lr in zip(self.optimizers, (recipe.matrix_lr, recipe.other_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * recipe.lr_factor(self.step)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def held_out_loss(self, tokens: torch.Tensor, num_windows: int = 24) -> float:
        """Return the mean loss on evenly spread windows, in nats a token."""
        rows = self.recipe.window
        starts = torch.linspace(0, len(tokens) - rows - 1, num_windows).long().tolist()
        windows = torch.stack([tokens[at : at + rows + 1] for at in starts])
        return sum(self._loss(part).item() * len(part) for part in windows.split(8)) / num_windows

    def _loss(self, windows: torch.Tensor) -> torch.Tensor:
        # Twice as fast as float32 with AVX-512; the weights and their sums stay float32.
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(windows[:, :-1]).logits
        return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    def save(self, path: Path) -> None:
        """Write a checkpoint; a reader finds the old one or the new one, nothing between."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial")
        torch.save(state, scratch)
        scratch.replace(path)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, if there is one of the same recipe."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{path} is of another recipe: {state['recipe']}; remove it")
        self.step, self.losses = state["step"], state["losses"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte, in the format of every other byte-level BPE."""
    alphabet = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({each: i for i, each in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    pad, bos, eos = _SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        model_max_length=_SHAPE["max_position_embeddings"],
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def read_tokens(*, held_out: bool) -> torch.Tensor:
    """Return one part of the standard library as token ids, a `</s>` after each module."""
    encode = byte_tokenizer().backend_tokenizer.encode
    ids: list[int] = []
    for path in module_files(held_out=held_out):
        # A few old modules are in Latin-1; whatever is no UTF-8 is left out.
        ids += [*encode(path.read_text("utf-8", errors="ignore")).ids, _SHAPE["eos_token_id"]]
    return torch.tensor(ids)


def train(training: Training, checkpoint: Path) -> Iterator[dict[str, float]]:
    """Train to the end, and yield the losses (bits a byte) at every checkpoint."""
    learned, held_out = read_tokens(held_out=False), read_tokens(held_out=True)
    recent: list[float] = []
    while training.step < training.recipe.steps:
        recent.append(training.advance(learned))
        if training.step % _EVERY == 0 or training.step == training.recipe.steps:
            bits = {
                "training": sum(recent) / len(recent) / math.log(2),
                "held_out": training.held_out_loss(held_out) / math.log(2),
            }
            training.losses.append({"step": training.step, **bits})
            training.save(checkpoint)
            recent.clear()
            yield training.losses[-1]


def write_model(training: Training, out: Path) -> None:
    """Write the model in bfloat16, its tokenizer, and the record of its training."""
    training.model.to(torch.bfloat16).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    # transformers 5 writes a class name that version 4 does not know; both know this one.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    ends = {name: _SHAPE[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    # No sampling defaults: a request says how it wants to be sampled.
    (out / "generation_config.json").write_text(json.dumps(ends) + "\n")
    record = {
        "recipe": asdict(training.recipe),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bits_per_byte": training.losses,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or go on training, and write the model."""
    parser = argparse.ArgumentParser(prog="python -m launch.train_demo", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=CACHE / "checkpoint.pt")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    training = Training(replace(Recipe(), steps=options.steps))
    training.restore(options.checkpoint)
    start = time.monotonic()
    for losses in train(training, options.checkpoint):
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        print(f"{numbers} ({time.monotonic() - start:.0f} s)", flush=True)
    write_model(training, options.out_dir)
    print(f"written to {options.out_dir}")


if __name__ == "__main__":
    main()
