"""The kernel's variants: they compile for every GPU, spill nothing, and agree on `Params`."""

import ptx
import pytest
import torch
from compiling import check_layout

from sglang_tokenweave.compiler import compile_kernel
from sglang_tokenweave.kernels import SHARED_LIMIT_BYTES, Params, choose_variant

ARCHITECTURES = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")
SHAPES = [
    (torch.bfloat16, 2, 8192),
    (torch.bfloat16, 4, 5120),
    (torch.bfloat16, 8, 16384),
    (torch.float16, 6, 264),
    (torch.float16, 8, 7168),
]
FORMS = [
    {},
    {"has_one_group": True},
    {"is_fp8": True},
    {"is_multicast": True},
    {"is_multicast": True, "is_fp8": True},
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_variants_fit_and_spill_nothing(shape, form, cache):
    variant = choose_variant(*shape, **form)
    assert variant.shared_bytes <= SHARED_LIMIT_BYTES
    assert variant.num_vecs * variant.group_threads * 8 >= shape[2]
    compiled = compile_kernel("allreduce_rmsnorm.cu", variant.expression, "sm_90a", cache=cache)
    assert compiled.resources.spill_stores_bytes == compiled.resources.spill_loads_bytes == 0
    assert compiled.resources.registers * variant.num_threads <= 65536


@pytest.mark.parametrize("is_multicast", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(arch, is_multicast, cache):
    limit = 99 * 1024 if arch == "sm_120a" else SHARED_LIMIT_BYTES
    shape = (torch.bfloat16, 8, 8192)
    variant = choose_variant(*shape, is_multicast=is_multicast, shared_limit_bytes=limit)
    assert variant.shared_bytes < limit
    compiled = compile_kernel("allreduce_rmsnorm.cu", variant.expression, arch, cache=cache)
    assert compiled.name.encode() in compiled.cubin
    assert compiled.resources.spill_stores_bytes == 0


@pytest.mark.parametrize("what", ["true, false", "false, true", "true, true"])
def test_the_kernel_that_only_moves_rows_compiles(what, cache):
    compiled = compile_kernel("sm_limits.cu", f"sm_limits<{what}>", "sm_90a", cache=cache)
    assert compiled.resources.spill_stores_bytes == compiled.resources.spill_loads_bytes == 0


def ptx_of(variant, cache):
    compiled = compile_kernel("allreduce_rmsnorm.cu", variant.expression, "sm_90a", cache=cache)
    return compiled.ptx


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_launch_that_starts_early_touches_nothing_before_the_kernel_before_it_has_ended(
    form, cache
):
    before, _ = ptx.early_start(ptx_of(choose_variant(*SHAPES[0], **form), cache))
    assert not ptx.global_accesses(before)


@pytest.mark.parametrize(
    ("dtype", "pair"), [(torch.bfloat16, "bf16x2"), (torch.float16, "f16x2")], ids=str
)
def test_multicast_addresses_are_touched_by_multimem_alone(dtype, pair, cache):
    """What is left of plain global accesses: the weight, the residual, the epochs, the signals."""
    variant = choose_variant(dtype, 8, 8192, is_multicast=True)
    forms = ptx.global_accesses(ptx_of(variant, cache))
    vecs, fetches = variant.num_vecs, variant.num_stages + 1
    assert forms == {
        # Before the loop and in it: the sum of the next row, added in float32.
        f"multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.{pair}": 2 * vecs,
        "multimem.st.relaxed.sys.global.v4.bf16x2": vecs,
        "ld.global.v4.u32": vecs,  # the weight
        "st.global.v4.u32": vecs,  # the residual
        "cp.async.cg.shared.global": fetches * vecs,  # the residual
        "cp.async.commit_group": fetches,
        "cp.async.wait_group": 1,
        "ld.global.u32": 1,  # the epoch
        "st.global.u32": 1,
        "st.release.sys.global.u64": 2,  # the signals of the two barriers
        "ld.acquire.sys.global.u64": forms["ld.acquire.sys.global.u64"],
    }


def test_unicast_uses_no_multimem(cache):
    forms = ptx.global_accesses(ptx_of(choose_variant(torch.bfloat16, 8, 8192), cache))
    assert not [form for form in forms if form.startswith("multimem")]


def test_params_are_laid_out_as_on_the_device(tmp_path):
    of_barrier = ("signals", "epochs", "deadline_ns", "rank", "digest")
    members = {name: f"barrier.{name}" for name in of_barrier}
    check_layout("allreduce_rmsnorm.cu", Params, tmp_path, members)


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((torch.float32, 2, 8192), "float32"),
        ((torch.bfloat16, 3, 8192), "3 ranks"),
        ((torch.bfloat16, 2, 8196), "8196"),
        ((torch.bfloat16, 2, 0), "hidden_size 0"),
        ((torch.bfloat16, 2, 16392), "16392"),
    ],
)
def test_other_shapes_are_refused_by_name(shape, named):
    with pytest.raises(ValueError, match=named):
        choose_variant(*shape)
