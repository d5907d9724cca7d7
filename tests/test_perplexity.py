"""On real text the woven server is as good as stock: the demo model's perplexity is the same.

The text is the part of the standard library that the demo model has not seen. Unlike random
weights, a trained model shows a fault that only makes answers worse, and by how much.
"""

import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from server import Server
from thorough import rare

from launch.command import DEMO_MODEL
from launch.stdlib_text import module_files

pytestmark = pytest.mark.server

WEAVE = ("--tokenweave-strict", "--tokenweave-min-tokens", "64")
# Rounding in float32 differs with the order of sums, but hardly moves the mean of 7,500 log
# probabilities: woven or not, one rank or two, 6e-9 apart. The mildest fault below: 1e-5.
RELATIVE_TOLERANCE = 1e-6
# A model that knows nothing gives each of the 256 bytes the same probability: perplexity 256. The
# demo model reaches 4.2.
CEILING = 6.0

Break = Callable[[Path], None]


def passages(length: int = 1500, number: int = 5) -> list[str]:
    """Return the beginnings of held-out modules: one per module, each three chunks of prefill."""
    texts = [path.read_text(errors="ignore") for path in module_files(held_out=True)]
    found = [text[:length] for text in texts if len(text) >= length and text.isascii()]
    assert len(found) >= number, "this Python comes without the sources of its standard library"
    return found[:number]


def perplexity(server: Server) -> float:
    """Return exp of the mean loss per byte over the passages, which are sent at once."""

    def logprobs(text: str) -> list[float]:
        answer = server.generate(
            text=text,
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            logprob_start_len=0,
        )
        values = [value for value, *_ in answer["meta_info"]["input_token_logprobs"][1:]]
        assert len(values) == len(text) - 1
        return values

    with ThreadPoolExecutor(8) as pool:
        values = [value for each in pool.map(logprobs, passages()) for value in each]
    return math.exp(-sum(values) / len(values))


@pytest.fixture(scope="module")
def stock() -> float:
    with Server(DEMO_MODEL, launcher="stock") as server:
        return perplexity(server)


def same(expected: float) -> object:
    return pytest.approx(expected, rel=RELATIVE_TOLERANCE)


def test_woven_equals_stock(stock: float) -> None:
    with Server(DEMO_MODEL, flags=WEAVE) as server:
        woven = perplexity(server)
        state = server.tokenweave()
    assert state is not None
    prefill = state["tokens"]["prefill"]
    assert prefill["weave"] >= 0.9 * sum(prefill.values()), prefill
    assert state["cuts"]["inside"] > 0
    assert not state["fallbacks"]
    assert woven == same(stock)


@rare
def test_one_rank_equals_two(stock: float) -> None:
    with Server(DEMO_MODEL, tp=1, launcher="stock") as server:
        assert perplexity(server) == same(stock)


def test_model_has_learnt(stock: float) -> None:
    assert stock < CEILING


def scale_one_norm(model: Path) -> None:
    """Make one of the eight norms inside the layers 5 % too large."""
    file = model / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.post_attention_layernorm.weight"].mul_(1.05)
    assert weights["model.layers.1.post_attention_layernorm.weight"].dtype == torch.bfloat16
    save_file(weights, file, metadata={"format": "pt"})


def enlarge_eps(model: Path) -> None:
    """Normalize with ten times the epsilon, 1e-5 in place of 1e-6: a usual value, but of others."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))


@pytest.mark.parametrize("damage", [scale_one_norm, pytest.param(enlarge_eps, marks=rare)])
def test_a_slight_fault_shows(damage: Break, stock: float, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    damage(broken)
    with Server(broken, tp=1, launcher="stock") as server:
        assert perplexity(server) != same(stock)
