"""What each patch must do: python patches/checks.py NAME [STOCK_FILE], the patched SGLang first on
PYTHONPATH. Needs no GPU; the tests run it.
"""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch


def check_serve_help(stock: str) -> None:
    """Compare the help of `sglang serve` with that of `stock`, its file before the patch."""
    from sglang.cli import main, serve

    assert serve.__file__ != stock
    spec = importlib.util.spec_from_file_location("stock_serve", stock)
    assert spec is not None
    assert spec.loader is not None
    stock_serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stock_serve)

    # SGLang's other half cannot be imported twice where it fails once, as it does on a CPU.
    sys.modules["sglang.multimodal_gen.runtime.entrypoints.cli.serve"] = None  # type: ignore[assignment] # absent on purpose
    sys.argv = ["sglang", "serve", "--help"]
    # In this order, since plugins stay loaded. Once stock shows the flag, drop the patch.
    before = _printed(lambda: stock_serve.serve(None, ["--help"]))
    after = _printed(main.main)
    assert "--model-path" in before
    assert "--flag-of-a-plugin" not in before
    assert "--flag-of-a-plugin" in after


def _printed(call: Callable[[], None]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        call()
    return output.getvalue()


def check_layer_loop() -> None:
    """Install a loop on each model, as a plugin would, and see when it is asked."""
    from sglang.srt.models.llama import LlamaModel
    from sglang.srt.models.mixtral import MixtralModel
    from sglang.srt.models.qwen2 import Qwen2Model
    from sglang.srt.models.qwen2_moe import Qwen2MoeModel
    from sglang.srt.models.qwen3 import Qwen3Model
    from sglang.srt.models.qwen3_moe import Qwen3MoeModel
    from sglang.srt.plugins.layer_loop import set_layer_loop

    kinds = (LlamaModel, MixtralModel, Qwen2Model, Qwen2MoeModel, Qwen3Model, Qwen3MoeModel)
    for kind in kinds:
        _check_loop_of(_bare_model(kind), captures=kind is not MixtralModel)

    class OwnForward(LlamaModel):  # type: ignore[misc] # SGLang is untyped
        def forward(self) -> None:
            """Ignore any loop."""

    with pytest.raises(TypeError, match=r"OwnForward\.forward does not support"):
        set_layer_loop(_bare_model(OwnForward), lambda *arguments: None)


def _check_loop_of(model: Any, *, captures: bool) -> None:
    from sglang.srt.plugins.layer_loop import set_layer_loop

    asked: list[tuple[Any, ...]] = []

    def loop(*arguments: Any) -> torch.Tensor | None:
        asked.append(arguments)
        return None if len(asked) == 2 else arguments[1] + 1

    set_layer_loop(model, loop)
    positions, batch = torch.arange(3), SimpleNamespace(can_run_tbo=False)
    output = model(torch.tensor([2, 0, 1]), positions, batch)
    assert torch.equal(output, torch.tensor([[3.0], [1.0], [2.0]]))
    assert asked[0][0] is positions
    assert asked[0][2] is batch
    assert _runs_own_layers(model, batch)  # the loop declines its second batch
    given = model(None, positions, batch, input_embeds=torch.zeros(3, 1))
    assert torch.equal(given, torch.ones(3, 1))
    assert len(asked) == 3

    with pytest.raises(RuntimeError, match="already has the layer loop"):
        set_layer_loop(model, loop)
    model.pp_group.world_size = 2
    assert _runs_own_layers(model, batch)
    model.pp_group.world_size = 1
    if captures:
        model.layers_to_capture = [7]
        assert _runs_own_layers(model, batch)
        model.layers_to_capture = []
    set_layer_loop(model, None)
    assert _runs_own_layers(model, batch)
    assert len(asked) == 3
    set_layer_loop(model, torch.nn.Linear(1, 1))  # a loop that is a module...
    assert not list(model.parameters())  # ... does not become a part of the model
    assert isinstance(model.layer_loop, torch.nn.Linear)


class OwnLayersError(Exception):
    """Raised by the layer of a bare model."""


def _bare_model(kind: Any) -> Any:
    """Build a model of one layer that only raises; a token's embedding is its number."""

    def layer(*arguments: Any, **keywords: Any) -> None:
        raise OwnLayersError

    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.pp_group = SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=1)
    model.embed_tokens = lambda tokens: tokens.float().unsqueeze(1)
    model.layers, model.start_layer, model.end_layer = [layer], 0, 1
    model.layers_to_capture = []
    return model


def _runs_own_layers(model: Any, batch: Any) -> bool:
    # What the MoE model looks up between its embedding and its layers needs a running server.
    moe = {"check_cuda_graph_backend": True, "is_prefill_context_parallel_enabled": False}
    lookups = {name: mock.Mock(return_value=value) for name, value in moe.items()}
    with (
        mock.patch.multiple("sglang.srt.models.qwen2_moe", create=True, **lookups),
        contextlib.suppress(OwnLayersError),
    ):
        model(torch.tensor([2, 0, 1]), torch.arange(3), batch)
        return False
    return True


def check_fp8() -> None:
    """Write FP8 linears into rows of a larger buffer, by each way a result takes there."""
    from sglang.srt.layers.quantization import fp8_utils

    kernels: Any = sys.modules[fp8_utils.w8a8_block_fp8_matmul_triton.__module__]
    kernels.get_device_name = lambda: "none"  # a kernel is looked up by the name of the GPU
    # In place of the kernels that a CPU lacks; one writes where it is told, the other allocates.
    kernels.deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
    kernels.deep_gemm_fp8_fp8_bf16_nt = _deep_gemm_stand_in
    fp8_utils.sglang_per_token_group_quant_fp8 = lambda x, group, **layout: (
        fp8_utils.per_token_group_quant_fp8(x, group)
    )
    fp8_utils.fp8_scaled_mm = lambda a, b, scale_a, scale_b, out_dtype, bias: (
        (a.float() @ b.float()) * scale_a * scale_b + (0 if bias is None else bias)
    ).to(out_dtype)
    torch.manual_seed(0)
    linears = {
        name: (_fp8_method(**attributes), _fp8_layer(**attributes))
        for name, attributes in {
            "scaled_mm": {},
            "cutlass": {"cutlass_fp8_supported": True},
            "triton": {"block": fp8_utils.triton_w8a8_block_fp8_linear},
            "deep_gemm": {"block": fp8_utils.deepgemm_w8a8_block_fp8_linear_with_fallback},
        }.items()
    }
    # DeepGEMM serves bfloat16 only; in float32 its linear falls back to Triton's kernel.
    for dtype in (torch.bfloat16, torch.float32):
        for name, (method, layer) in linears.items():
            _check_fp8_output(method, layer, dtype, direct=name != "cutlass")
        _check_row_parallel(*linears["triton"], dtype)
    _check_quantized_input(*linears["deep_gemm"])
    _check_fp8_refusals(*linears["triton"])


def _fp8_method(*, block: Any = None, cutlass_fp8_supported: bool = False) -> Any:
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

    method = Fp8LinearMethod.__new__(Fp8LinearMethod)  # __init__ reads the server's configuration
    for absent in ("use_marlin", "use_mxfp8", "block_fp8_as_mxfp8", "use_per_token_if_dynamic"):
        setattr(method, absent, False)
    method.cutlass_fp8_supported = cutlass_fp8_supported
    method.block_quant = block is not None
    method.weight_block_size = [128, 128]
    method.w8a8_block_fp8_linear = block
    return method


def _fp8_layer(*, block: Any = None, cutlass_fp8_supported: bool = False) -> Any:
    """Make a layer of 256 inputs and 128 outputs; `dequantized` is its weight in float64."""
    weight = (torch.randn(128, 256) / 8).to(torch.float8_e4m3fn)
    layer = SimpleNamespace(output_size_per_partition=128, weight=weight)
    if block is not None:
        layer.weight_scale_inv = scale = torch.tensor([[0.5, 2.0]])
        layer.dequantized = weight.double() * scale.repeat_interleave(128, dim=1)
        return layer
    layer.weight = weight.t()
    layer.input_scale = torch.tensor(0.02)
    shape = (128, 1) if cutlass_fp8_supported else ()
    layer.weight_scale = torch.rand(shape) + 0.5
    layer.dequantized = weight.double() * layer.weight_scale
    if cutlass_fp8_supported:
        layer.weight_scale = layer.weight_scale.view(1, 128)
    return layer


def _deep_gemm_stand_in(a: Any, a_scale: Any, b: Any, b_scale: Any, c: Any, *block: int) -> None:
    a = a.float() * a_scale.repeat_interleave(128, dim=1)
    b = b.float() * b_scale.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    c.copy_(a @ b.t())


def _check_fp8_output(method: Any, layer: Any, dtype: torch.dtype, *, direct: bool) -> None:
    x, bias = torch.randn(5, 256, dtype=dtype), torch.randn(128, dtype=dtype)
    for used_bias in (None, bias):
        expected = method.apply(layer, x, used_bias)
        exact = x.double() @ layer.dequantized.t() + (0 if used_bias is None else bias.double())
        # Quantizing x to 3 bits of mantissa moves the result; a wrong scale moves it far more.
        assert (expected - exact).abs().max() < 0.15 * exact.abs().max()

        buffer = torch.full((9, 128), torch.nan, dtype=dtype)
        assert method.apply_into(layer, x, buffer[2:7], used_bias).data_ptr() == (
            buffer[2:7].data_ptr()
        )
        assert torch.equal(buffer[2:7], expected)
        assert buffer[:2].isnan().all()
        assert buffer[7:].isnan().all()
        out = method.apply(layer, x, used_bias, out=buffer[2:7])
        assert (out.data_ptr() == buffer[2:7].data_ptr()) == direct

    # What a kernel must not be given is filled by a copy.
    apart = torch.empty(5, 256, dtype=dtype)[:, ::2]
    unaligned = torch.empty(5 * 128 + 1, dtype=dtype)[1:].view(5, 128)
    other_type = torch.empty(5, 128, dtype=torch.float64)
    for output in (apart, unaligned, other_type):
        assert method.apply_into(layer, x, output, bias) is output
        assert torch.equal(output, expected.to(output.dtype))


def _check_row_parallel(method: Any, layer: Any, dtype: torch.dtype) -> None:
    """Call the entry that raises "cannot write into caller-owned linear output" unpatched."""
    from sglang.srt.layers import linear

    row = linear.RowParallelLinear.__new__(linear.RowParallelLinear)
    torch.nn.Module.__init__(row)
    absent = ("skip_bias_add", "reduce_results", "use_dp_attention_reduce", "use_decode_attn_tp")
    vars(row).update(dict.fromkeys(absent, False), input_is_parallel=True, tp_rank=0, tp_size=1)
    vars(row).update(quant_method=method, bias=torch.randn(128, dtype=dtype), tp_group=None)
    vars(row).update(vars(layer))
    stand_ins: dict[str, Any] = {
        "use_symmetric_memory": lambda *group, **options: contextlib.nullcontext(),
        "is_allocation_symmetric": lambda: False,
        "get_parallel": lambda: SimpleNamespace(tp_group=None),
        "get_tp_group": lambda: None,
        "get_group_rank_size": lambda group: (0, 1),
        "get_forward": lambda: SimpleNamespace(sp_active=False),
        "should_skip_mlp_all_reduce": lambda: False,
    }
    x, output = torch.randn(5, 256, dtype=dtype), torch.empty(5, 128, dtype=dtype)
    with mock.patch.multiple(linear, create=True, **stand_ins):
        expected, _ = row(x)
        assert row(x, output_tensor=output)[0] is output
    assert torch.equal(output, expected)


def _check_quantized_input(method: Any, layer: Any) -> None:
    from sglang.srt.layers.quantization.fp8_utils import per_token_group_quant_fp8

    quantized = per_token_group_quant_fp8(torch.randn(8, 256, dtype=torch.bfloat16), 128)
    output = torch.empty(8, 128, dtype=torch.bfloat16)
    assert method.apply_into(layer, quantized, output) is output
    assert torch.equal(output, method.apply(layer, quantized))


def _check_fp8_refusals(method: Any, layer: Any) -> None:
    x = torch.randn(5, 256)
    with pytest.raises(ValueError, match="requires a 2D input"):
        method.apply_into(layer, x.view(1, 5, 256), torch.empty(1, 5, 128))
    with pytest.raises(ValueError, match=r"\[4, 128\].*expected \(5, 128\)"):
        method.apply_into(layer, x, torch.empty(4, 128))


CHECKS: dict[str, Callable[..., None]] = {
    "fp8-apply-into": check_fp8,
    "serve-help-plugins": check_serve_help,
    "layer-loop": check_layer_loop,
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](*sys.argv[2:])
