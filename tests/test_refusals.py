"""Everything that is not woven is named."""

from types import SimpleNamespace

import pytest

from sglang_tokenweave import flags, refusals
from sglang_tokenweave.config import ENVIRONMENT_VARIABLE
from sglang_tokenweave.refusals import ModelFacts

LLAMA = ModelFacts(architecture="LlamaForCausalLM", is_supported=True)
PLAIN = {
    "tp_size": 2,
    "ep_size": 1,
    "enable_lora": None,
    "lora_paths": [],
    "speculative_algorithm": None,
    "moe_a2a_backend": "none",
    "enable_torch_compile": False,
}


def test_a_plain_server_is_woven():
    assert refusals.find(PLAIN, LLAMA) == ()


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("tp_size", 1, "tensor parallel size is 1"),
        ("enable_lora", True, "LoRA"),
        ("lora_paths", ["a=b"], "LoRA"),
        ("enable_dp_attention", True, "data-parallel attention"),
        ("speculative_algorithm", "EAGLE3", "speculative decoding"),
        ("ep_size", 2, "expert parallelism"),
        ("moe_a2a_backend", "deepep", "all-to-all expert dispatch"),
        ("attn_cp_size", 2, "context parallelism"),
        ("dcp_size", 2, "decode context parallelism"),
        ("enable_torch_compile", True, "torch.compile"),
        ("enable_deterministic_inference", True, "deterministic inference"),
        ("rl_on_policy_target", "fsdp", "on-policy RL"),
        ("enable_two_batch_overlap", True, "two-batch overlap"),
        ("enable_single_batch_overlap", True, "single-batch overlap"),
        ("enable_eplb", True, "expert load balancing"),
        ("expert_distribution_recorder_mode", "stat", "expert distributions"),
        ("enable_layernorm_sp", True, "sequence-parallel LayerNorm"),
        ("enable_quant_communications", True, "quantized communication"),
        ("enable_pdmux", True, "prefill/decode multiplexing"),
        ("enable_unified_memory", True, "unified KV memory"),
        ("enable_memory_saver", True, "memory saver"),
        ("enable_nvidia_megakernel", True, "megakernel"),
        ("dllm_algorithm", "LowConfidence", "diffusion"),
        ("enable_attn_tp_input_scattered", True, "scattered attention inputs"),
    ],
)
def test_each_feature_is_refused_by_name(argument, value, named):
    (reason,) = refusals.find({**PLAIN, argument: value}, LLAMA)
    assert named in reason


def test_every_rule_is_tested_above():
    marks = test_each_feature_is_refused_by_name.pytestmark
    tested = {case[0] for mark in marks for case in mark.args[1]}
    assert {rule.argument for rule in refusals.RULES} <= tested


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"architecture": "Gemma2ForCausalLM", "is_supported": False}, "Gemma2ForCausalLM"),
        ({"is_mla": True}, "MLA"),
        ({"is_multimodal": True}, "multimodal"),
        ({"captures_layers": True}, "hidden states"),
        ({"has_plain_norms": False}, "RMSNorm"),
        ({"has_megakernel": True}, "megakernel"),
    ],
)
def test_each_model_is_refused_by_name(facts, named):
    model = ModelFacts(**{"architecture": "LlamaForCausalLM", "is_supported": True, **facts})
    (reason,) = refusals.find(PLAIN, model)
    assert named in reason


def test_all_reasons_are_given_and_a_feature_once():
    arguments = {**PLAIN, "tp_size": 1, "enable_lora": True, "lora_paths": ["a"], "ep_size": 2}
    reasons = refusals.find(arguments, LLAMA)
    assert len(reasons) == 3


def test_a_pipeline_is_woven():
    assert refusals.find({**PLAIN, "pp_size": 4, "enable_dynamic_chunking": True}, LLAMA) == ()


def test_ray_is_refused_where_the_server_is_launched():
    assert refusals.launch_reason(SimpleNamespace(**PLAIN)) is None
    assert "Ray (--use-ray)" in refusals.launch_reason(SimpleNamespace(**PLAIN, use_ray=True))


def test_ray_is_said_or_stops_a_strict_launch(monkeypatch, capsys):
    with_ray = SimpleNamespace(use_ray=True)
    flags.check_arguments(with_ray)  # not switched on: nothing of ours to say
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '{"enabled": true}')
    flags.check_arguments(with_ray)
    assert "TokenWeave is NOT active, the server runs stock: not supp" in capsys.readouterr().err
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '{"enabled": true, "strict": true}')
    with pytest.raises(SystemExit, match="2"):
        flags.check_arguments(with_ray)
    assert "error: TokenWeave is strict" in capsys.readouterr().err


def test_attention_backends():
    assert refusals.attention_reason({"fa3", "triton"}) is None
    assert "flashmla" in refusals.attention_reason({"flashmla", "fa3"})
