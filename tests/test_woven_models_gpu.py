"""Other models in the weave's CUDA graphs, in a real SGLang, with ranks emulated on one GPU."""

import shutil

import pytest
import torch
import woven_servers
from gpu_servers import MODEL, WEAVE
from safetensors.torch import load_file, save_file
from woven_servers import ask_all, differences, server, woven

from sglang_tokenweave.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EXPERTS = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 1024}
MODELS = ("mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
OUTLIERS_ONE_IN, OUTLIERS = 1000, 16  # of weights that are so many times as large


@pytest.fixture
def emulation(tmp_path):
    (tmp_path / "plugin").mkdir()
    return woven_servers.emulation(tmp_path / "plugin")


def make(architecture, folder):
    experts = EXPERTS if architecture.startswith("qwen") and "moe" in architecture else {}
    return make_tiny_model(architecture, folder / architecture, "bfloat16", **MODEL, **experts)


def check(model, emulation, flags=()):
    """Check that the weave's mean error against float32 is no larger than stock's.

    Not the root of the mean square, which a few tokens decide where routers and outliers make the
    errors' tails heavy. 5 % is what a few thousand tokens leave to chance.
    """
    reference = woven_servers.reference(woven_servers.in_float32(model))
    with server(model, 1, "stock", flags) as running:
        stock = ask_all(running)
    found = woven(model, 1, emulation, (*WEAVE, *flags))
    errors = [
        sum(map(abs, wrong)) / len(wrong)
        for wrong in (differences(found, reference), differences(stock, reference))
    ]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("architecture", MODELS)
def test_all_architectures_are_as_exact_as_stock(architecture, emulation, tmp_path):
    check(make(architecture, tmp_path), emulation)


def test_weights_with_outliers_are_as_exact_as_stock(emulation, tmp_path):
    model = make("llama", tmp_path)
    other = shutil.copytree(model, tmp_path / "outliers")
    generator = torch.Generator().manual_seed(0)
    for path in other.glob("*.safetensors"):
        weights = load_file(path)
        for weight in weights.values():
            if weight.dim() >= 2:
                drawn = torch.rand(weight.shape, generator=generator)
                weight[drawn < 1 / OUTLIERS_ONE_IN] *= OUTLIERS
        save_file(weights, path, metadata={"format": "pt"})
    check(other, emulation)


def test_weights_in_fp8_are_as_exact_as_stock(emulation, tmp_path):
    # SGLang quantises them as it loads them, and each batch's activations.
    check(make("llama", tmp_path), emulation, ("--quantization", "fp8"))


def test_mixed_chunks_are_as_exact_as_stock(emulation, tmp_path):
    check(make("llama", tmp_path), emulation, ("--enable-mixed-chunk",))
