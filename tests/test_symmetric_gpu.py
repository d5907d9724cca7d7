"""Memory shared by two processes on real GPUs: on one each, or on one GPU where there is one."""

import ctypes
import os

import pytest
import torch
from distributed import run_ranks
from gpus import RANKS

WORLD = 2
NUM_BYTES = 3 << 20
CYCLES, FAILING_CYCLES = 200, 50
WARM_UP = 3  # the driver keeps what it allocates for itself on first use
# Multicast reaches beyond this process, into an NVSwitch that other jobs may share: it is tested
# only where the machine's owner says so, and never against a switch (see switches.py).
MAY_USE_MULTICAST = os.environ.get("TOKENWEAVE_TEST_MULTICAST") == "1"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU"),
]
on_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")


def _make(rank, **options):
    from sglang_tokenweave.symmetric import PeerMemory

    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    return PeerMemory(NUM_BYTES, device, torch.distributed.group.WORLD, **options)


def _used():
    """Return (free bytes of the GPU, open descriptors) while no rank holds memory."""
    from sglang_tokenweave import driver

    torch.cuda.synchronize()
    torch.distributed.barrier()
    free, _ = driver.call("cuMemGetInfo")
    found = free, len(os.listdir("/proc/self/fd"))
    torch.distributed.barrier()
    return found


def _good_cycles(rank, options):
    before = None
    for index in range(CYCLES + WARM_UP):
        if index == WARM_UP:
            before = _used()
        memory = _make(rank, **options)
        assert (memory.multicast_address is None) == ("use_multicast" not in options)
        torch.distributed.barrier()
        memory.close()
    return before, _used()


def _failing_cycles(rank, name):
    from sglang_tokenweave import driver
    from sglang_tokenweave.agreement import DisagreementError

    call, before = driver.call, None

    def failing(function, *arguments):
        if function == name and rank == 1:
            raise driver.CudaError(f"{name}: a test lets it fail")
        return call(function, *arguments)

    driver.call = failing
    for index in range(FAILING_CYCLES + WARM_UP):
        if index == WARM_UP:
            before = _used()
        with pytest.raises(DisagreementError, match=f"rank 1: {name}: a test lets it fail"):
            _make(rank)
    return before, _used()


def _check_nothing_is_left(answers):
    for (free_before, open_before), (free_after, open_after) in answers:
        assert open_after == open_before
        # One allocation that stayed would take 2 MiB, the granularity, at least.
        assert free_before - free_after < 2 << 20


@pytest.mark.parametrize("across_hosts", [False, True], ids=["descriptors", "fabric if possible"])
def test_cycles_leave_nothing_behind(across_hosts):
    options = {"across_hosts": across_hosts}
    _check_nothing_is_left(run_ranks(_good_cycles, RANKS, options, timeout_s=300))


@on_two_gpus
@pytest.mark.multi_gpu
@pytest.mark.skipif(not MAY_USE_MULTICAST, reason="TOKENWEAVE_TEST_MULTICAST is not 1")
def test_cycles_with_multicast_leave_nothing_behind():
    _check_nothing_is_left(run_ranks(_good_cycles, RANKS, {"use_multicast": True}, timeout_s=300))


@pytest.mark.parametrize("name", ["cuMemImportFromShareableHandle", "cuMemSetAccess", "cuMemsetD8"])
def test_failures_of_one_rank_leave_nothing_behind_on_any(name):
    _check_nothing_is_left(run_ranks(_failing_cycles, RANKS, name, timeout_s=300))


def _meet_in_memory(rank, options, hide_others=False):
    """Write into the own and the other's memory; return what is in the own one at last."""
    if hide_others:  # CUDA reads it when it starts, which it has not in this process
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank]
        assert torch.cuda.device_count() == 1
    from sglang_tokenweave import driver

    memory = _make(rank, **options)
    other = memory.addresses[1 - rank]
    was_zero = not memory.bytes.any().item()
    assert len(memory.bytes) >= NUM_BYTES
    torch.distributed.barrier()
    memory.bytes[:1000] = 10 + rank  # for the other to read
    torch.cuda.synchronize()
    torch.distributed.barrier()
    driver.call("cuMemcpyDtoD", memory.addresses[rank] + 1000, other, 1000)  # what the other wrote
    text = (ctypes.c_uint8 * 1000)(*[20 + rank] * 1000)
    driver.call("cuMemcpyHtoD", other + 2000, ctypes.addressof(text), 1000)
    torch.cuda.synchronize()
    torch.distributed.barrier()
    found = memory.bytes[:4000].view(4, 1000).cpu()
    torch.distributed.barrier()
    memory.close()
    return was_zero, found


def _check_they_met(answers):
    for rank, (was_zero, found) in enumerate(answers):
        assert was_zero
        for row, value in zip(found, (10 + rank, 11 - rank, 21 - rank, 0), strict=True):
            assert (row == value).all()


@pytest.mark.parametrize("across_hosts", [False, True], ids=["descriptors", "fabric if possible"])
def test_each_rank_reads_and_writes_the_memory_of_the_other(across_hosts):
    _check_they_met(run_ranks(_meet_in_memory, WORLD, {"across_hosts": across_hosts}))


@on_two_gpus
@pytest.mark.multi_gpu
def test_ranks_that_do_not_see_the_gpu_of_the_other_reach_its_memory():
    _check_they_met(run_ranks(_meet_in_memory, WORLD, {}, True))


def _with_a_switch(rank, name, value):
    from sglang_tokenweave import driver

    os.environ[name] = value
    bindings, called = driver.bindings(), []

    class Recording:
        def __getattr__(self, function):
            called.append(function)
            return getattr(bindings, function)

    driver.bindings = Recording
    memory = _make(rank, use_multicast=True)
    found = memory.multicast_address, memory.why_no_multicast
    memory.close()
    assert "cuMemCreate" in called
    return *found, [function for function in called if function.startswith("cuMulticast")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_NVLS_ENABLE", "0"),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
        ("NVSHMEM_DISABLE_NVLS", "1"),
    ],
)
def test_with_a_switch_no_multicast_function_of_the_driver_is_reached(name, value):
    for address, why, called in run_ranks(_with_a_switch, RANKS, name, value):
        assert address is None
        assert "forbids multicast" in why  # naming this switch, or one that was set before
        assert called == []


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs exactly one GPU")
def test_ranks_on_one_gpu_have_no_multicast():
    for address, why in run_ranks(_on_one_gpu, WORLD):
        assert address is None
        assert "ranks share a GPU" in why or "forbids multicast" in why


def _on_one_gpu(rank):
    memory = _make(rank, use_multicast=True)
    found = memory.multicast_address, memory.why_no_multicast
    memory.close()
    return found
