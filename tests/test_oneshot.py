"""The small-batch op: what it refuses, what it asks of flashinfer, and its results on GPUs."""

import sys
import types

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from sglang_tokenweave.agreement import DisagreementError
from sglang_tokenweave.oneshot import OneShot, check_sizes, exchange_bytes

EPS = 1e-5
HIDDEN = 64
SIZES = {"max_tokens": 4, "hidden_size": HIDDEN, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((8, 8192, 3, torch.bfloat16), r"3 ranks: .* built for \(2, 4, 8, 16\)"),
        ((8, 8192, 2, torch.float32), "dtype torch.float32: allowed are torch.bfloat16"),
        ((8, 8191, 2, torch.bfloat16), "hidden_size 8191: it must be a multiple of 8"),
        ((0, 8192, 2, torch.bfloat16), "max_tokens 0: from 1 to 65472"),
        ((65473, 8192, 2, torch.bfloat16), "max_tokens 65473: from 1 to 65472"),
    ],
)
def test_sizes_that_the_kernel_does_not_do_are_named(arguments, wanted):
    with pytest.raises(ValueError, match=wanted):
        check_sizes(*arguments)


def test_the_largest_exchange_is_just_below_two_gigabytes():
    check_sizes(65472, 8192, 2, torch.bfloat16)
    assert exchange_bytes(65472, 8192, 2, torch.bfloat16) < 2**31
    assert exchange_bytes(65536, 8192, 2, torch.bfloat16) == 2**31


def _without_flashinfer():
    sys.modules["flashinfer"] = None  # an import of it fails, installed or not
    with pytest.raises(DisagreementError) as refusal:
        OneShot(dist.group.WORLD, **SIZES)
    return str(refusal.value)


class _Workspace:
    ipc_handles = object()

    def __init__(self, fails):
        if fails:
            raise KeyError("no memory")
        self.destroyed = False

    def destroy(self):
        self.destroyed = True


def _with_flashinfer(fails):
    """Stand in for flashinfer, whose kernels need a GPU, and record what is asked of it."""
    asked = {}

    def create(**arguments):
        asked["create"] = arguments
        asked["workspace"] = _Workspace(fails)
        return asked["workspace"]

    def fuse(**arguments):
        asked["fuse"] = arguments

    comm = types.ModuleType("flashinfer.comm")
    comm.create_allreduce_fusion_workspace = create
    comm.allreduce_fusion = fuse
    forget = "trtllm_destroy_ipc_workspace_for_all_reduce_fusion"
    setattr(comm, forget, lambda handles: asked.update(forgotten=handles))
    comm.AllReduceFusionPattern = types.SimpleNamespace(kARResidualRMSNorm=1)
    mnnvl = types.ModuleType("flashinfer.comm.mnnvl")
    mnnvl.TorchDistBackend = lambda group: ("backend", group)
    package = types.ModuleType("flashinfer")
    package.comm = comm
    sys.modules |= {
        "flashinfer": package,
        "flashinfer.comm": comm,
        "flashinfer.comm.mnnvl": mnnvl,
    }
    try:
        op = OneShot(dist.group.WORLD, **SIZES)
    except DisagreementError as error:
        return str(error)
    return _calls(op, asked)


def _calls(op, asked):
    x, residual = torch.zeros(2, 3, HIDDEN, dtype=torch.bfloat16)
    weight = torch.zeros(HIDDEN, dtype=torch.bfloat16)
    op.allreduce_rmsnorm(x, residual, weight, EPS)
    assert asked["fuse"]["launch_with_pdl"] is False  # it would read the residual too early
    op.allreduce_rmsnorm(x, residual, weight, EPS, early_launch=True)
    assert asked["fuse"]["launch_with_pdl"] is True
    output, total = op.allreduce_rmsnorm(x, residual, weight, EPS, weight_offset=1.0)
    given = asked["fuse"]
    assert given["norm_out"] is output
    assert given["residual_out"] is total
    assert len({tensor.data_ptr() for tensor in (x, residual, output, total)}) == 4
    refusals = []
    for wrong in (
        (torch.zeros(5, HIDDEN, dtype=torch.bfloat16), residual, weight),
        (x, residual[:2], weight),  # the shard that the other op takes
        (x, residual, weight.float()),
        (x.T.contiguous().T, residual, weight),
        (x, torch.zeros(3 * HIDDEN + 1, dtype=torch.bfloat16)[1:].view(3, HIDDEN), weight),
    ):
        with pytest.raises(ValueError, match=r".") as refusal:
            op.allreduce_rmsnorm(*wrong, EPS)
        refusals.append(str(refusal.value))
    op.close()
    assert asked["forgotten"] is _Workspace.ipc_handles
    assert asked["workspace"].destroyed
    plain = {name: given[name] for name in ("use_oneshot", "fp32_acc", "weight_bias", "pattern")}
    create = asked["create"] | {"comm_backend": asked["create"]["comm_backend"][0]}
    return create, plain, refusals


def _work(rank):
    return _without_flashinfer(), _with_flashinfer(fails=rank == 1), _with_flashinfer(fails=False)


@pytest.fixture(scope="module")
def told():
    """Return what each of two ranks found: without flashinfer, failing on one, and working."""
    return run_ranks(_work, 2)


def test_without_flashinfer_all_ranks_say_what_to_install(told):
    for text, _, _ in told:
        assert "rank 0: flashinfer is missing: pip install 'flashinfer-python" in text


def test_a_workspace_that_fails_on_one_rank_fails_on_all(told):
    for _, text, _ in told:
        assert text == "flashinfer's workspace failed on rank 1: KeyError: 'no memory'"


def test_flashinfer_is_asked_for_one_shot_over_unicast_memory(told):
    for rank, (_, _, (create, plain, refusals)) in enumerate(told):
        assert create == {
            "backend": "trtllm",  # never "auto" or "mnnvl": those use multicast
            "world_size": 2,
            "rank": rank,
            "max_token_num": 4,
            "hidden_dim": HIDDEN,
            "dtype": torch.bfloat16,
            "comm_backend": "backend",
        }
        assert plain == {"use_oneshot": True, "fp32_acc": True, "weight_bias": 1.0, "pattern": 1}
        for text, wanted in zip(
            refusals,
            (
                "5 tokens: the workspace is for 1 to 4",
                "residual is (2, 64)",
                "weight is (64,) torch.float32",
                "x must be contiguous",
                "residual must be contiguous and aligned to 16 bytes",
            ),
            strict=True,
        ):
            assert text.startswith(wanted)


# On GPUs: hidden size, type, tokens, weight offset.
CASES = (
    (8192, torch.bfloat16, 1, 0.0),
    (8192, torch.bfloat16, 32, 1.0),
    (5120, torch.bfloat16, 7, 0.0),
    (4096, torch.float16, 128, 0.0),
)


def _on_gpu(rank, case):
    hidden, dtype, tokens, offset = case
    torch.cuda.set_device(rank)
    generator = torch.Generator().manual_seed(tokens)
    partials, residual, weight = (
        torch.randn(shape, generator=generator).to(dtype).cuda()
        for shape in ((2, tokens, hidden), (tokens, hidden), (hidden,))
    )
    op = OneShot(dist.group.WORLD, max_tokens=128, hidden_size=hidden, dtype=dtype)
    total = partials.double().sum(0) + residual.double()
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
    expected = total * scale * (offset + weight.double())

    def call():
        return op.allreduce_rmsnorm(partials[rank], residual, weight, EPS, weight_offset=offset)

    eager = call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = call()
    for _ in range(100):
        graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    errors = [
        ((value.double() - wanted).norm() / wanted.norm()).item()
        for values in (eager, captured)
        for value, wanted in zip(values, (expected, total), strict=True)
    ]
    op.close()
    return errors, [value.cpu() for value in eager]


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs with peer access")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64_and_all_ranks_hold_the_same_bits(case):
    pytest.importorskip("flashinfer")
    # flashinfer compiles its kernels at first use: minutes.
    answers = run_ranks(_on_gpu, 2, case, timeout_s=600)
    for errors, values in answers:
        # bf16 rounds to 2^-9 relative, 1.7e-3 rms on random data. The kernel rounds three times
        # (sum, residual, output): 1.7 times that; twice is allowed, as for one rounding.
        assert max(errors) < 7e-3
        for value, first in zip(values, answers[0][1], strict=True):
            assert torch.equal(value, first)
