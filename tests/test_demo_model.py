"""The demo model in the repository: its size, its tokenizer, what it knows, its training."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import demo, train_demo
from launch.command import DEMO_MODEL
from launch.stdlib_text import is_held_out, module_files

TINY = train_demo.Recipe(
    steps=6, tokens_per_step=128, window=64, last_window=128, last_share=0.5, warmup_steps=2
)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) < 10e6


def test_the_tokenizer_is_one_token_a_byte() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = "def café():\n\treturn  '日本 🐍'\r\n" + "".join(map(chr, range(256)))
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert 3 <= min(ids) < max(ids) < 259
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 2


def test_the_chat_template_is_the_text_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    messages = [{"role": "system", "content": "# a"}, {"role": "user", "content": "def f("}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "# a\ndef f("


@pytest.fixture(scope="module")
def trained() -> train_demo.Training:
    training = train_demo.Training(train_demo.Recipe())
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    training.model.load_state_dict(model.state_dict())
    return training


def test_it_knows_what_its_record_says(trained: train_demo.Training) -> None:
    bits = trained.held_out_loss(train_demo.read_tokens(held_out=True)) / math.log(2)
    record = json.loads((DEMO_MODEL / "training.json").read_text())
    # Rounding the weights to bfloat16 costs less than 0.01; another Python has other sources.
    assert bits == pytest.approx(record["bits_per_byte"][-1]["held_out"], abs=0.1)
    assert bits < 2


@torch.no_grad()
def test_it_reads_to_the_end_of_its_context(trained: train_demo.Training) -> None:
    windows = train_demo.read_tokens(held_out=True)[: 16 * 2049].view(16, 2049)
    logits = trained.model(windows[:, :-1]).logits
    losses = cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    # What came before helps: a model that loses its way at the far positions would get worse.
    assert losses[:, 1024:].mean() < losses[:, :512].mean()


def test_no_module_is_in_both_parts() -> None:
    learnt, held_out = module_files(held_out=False), module_files(held_out=True)
    assert not set(learnt) & set(held_out)
    assert len(learnt) > 300
    assert [is_held_out(name) for name in ("pathlib.py", "enum.py", "argparse.py")] == [
        True,
        True,
        False,
    ]


def test_demo_prompts_are_of_text_held_out() -> None:
    held_out = [path.read_text(errors="ignore") for path in module_files(held_out=True)]
    for seed in (1, 2):
        prompt = demo.demo_request(seed, demo.SHORT)["text"]
        assert any(prompt in text for text in held_out)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models be small: in bfloat16, Muon's steps for the demo's take 15 s each on some CPUs."""
    for name, size in {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}.items():
        monkeypatch.setitem(train_demo._SHAPE, name, size)


@pytest.mark.usefixtures("small")
def test_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    tokens = torch.randint(3, 259, (2000,), generator=torch.Generator().manual_seed(5))
    whole = train_demo.Training(TINY)
    losses = [whole.advance(tokens) for _ in range(6)]
    first = train_demo.Training(TINY)
    again = [first.advance(tokens) for _ in range(3)]
    first.save(tmp_path / "checkpoint.pt")
    second = train_demo.Training(TINY)
    second.restore(tmp_path / "checkpoint.pt")
    again += [second.advance(tokens) for _ in range(3)]
    assert again == losses
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.usefixtures("small")
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train_demo.Training(TINY).save(tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="of another recipe"):
        train_demo.Training(replace(TINY, seed=1)).restore(tmp_path / "checkpoint.pt")


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [TINY.lr_factor(step) for step in range(7)]
    assert factors[0] == 0.5
    assert factors[1:] == sorted(factors[1:], reverse=True)
    assert factors[6] == 0
    assert [TINY.window_at(step) for step in range(6)] == [64, 64, 64, 128, 128, 128]
