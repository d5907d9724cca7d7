"""The kernel's variants: they compile for every GPU, spill nothing, and agree on `Params`."""

import ctypes

import pytest
import torch

from sglang_tokenweave.compiler import compile_kernel, source_folder
from sglang_tokenweave.kernels import SHARED_LIMIT_BYTES, Params, choose_variant

ARCHITECTURES = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")
SHAPES = [
    *((torch.bfloat16, ranks, hidden) for ranks in (2, 4, 6, 8) for hidden in (4096, 8192)),
    (torch.bfloat16, 2, 5120),
    (torch.bfloat16, 2, 16384),
    (torch.bfloat16, 4, 16384),
    (torch.float16, 2, 8),
    (torch.float16, 8, 7168),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_variants_fit_and_spill_nothing(shape, tmp_path):
    variant = choose_variant(*shape)
    assert variant.shared_bytes <= SHARED_LIMIT_BYTES
    assert variant.num_vecs * variant.group_threads * 8 >= shape[2]
    compiled = compile_kernel("allreduce_rmsnorm.cu", variant.expression, "sm_90a", cache=tmp_path)
    assert compiled.resources.spill_stores_bytes == compiled.resources.spill_loads_bytes == 0
    assert compiled.resources.registers * variant.num_threads <= 65536


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(arch, tmp_path):
    variant = choose_variant(torch.bfloat16, 8, 8192)
    compiled = compile_kernel("allreduce_rmsnorm.cu", variant.expression, arch, cache=tmp_path)
    assert compiled.name.encode() in compiled.cubin


def test_params_are_laid_out_as_on_the_device(tmp_path):
    """The compiler itself compares: a wrong offset is a failed static_assert."""
    members = {"signals": "barrier.signals", "epochs": "barrier.epochs", "rank": "barrier.rank"}
    members["deadline_ns"] = "barrier.deadline_ns"
    checks = "".join(
        f"static_assert(__INTADDR__(&((Params*)0)->{members.get(name, name)}) == "
        f"{getattr(Params, name).offset});\n"
        for name, _ in Params._fields_
    )
    for source in source_folder().glob("*.cu*"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "layout.cu").write_text(
        '#include "allreduce_rmsnorm.cu"\n'
        f"static_assert(sizeof(Params) == {ctypes.sizeof(Params)});\n{checks}"
        "template <int kUnused> __global__ void layout() {}\n"
    )
    compile_kernel("layout.cu", "layout<0>", "sm_90a", sources=tmp_path, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((torch.float32, 2, 8192), "float32"),
        ((torch.bfloat16, 3, 8192), "3 ranks"),
        ((torch.bfloat16, 2, 8196), "8196"),
        ((torch.bfloat16, 2, 0), "hidden_size 0"),
        ((torch.bfloat16, 2, 16392), "16392"),
        ((torch.bfloat16, 8, 16384), "does not fit"),
    ],
)
def test_other_shapes_are_refused_by_name(shape, named):
    with pytest.raises(ValueError, match=named):
        choose_variant(*shape)
