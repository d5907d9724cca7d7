"""Memory shared by all ranks, on a model of the driver: the good run and what may differ in it."""

import platform

import pytest
from driver_model import GRANULARITY, KILL, MULTICAST_RECOMMENDED, Gpu
from sharing_ranks import NUM_BYTES, SWITCHES, share

from sglang_tokenweave import deadlines, descriptors, devices
from sglang_tokenweave.agreement import DisagreementError, LostRankError


def _check_all_unicast(session, why):
    """All ranks have their unicast memory, and none multicast, for the same reason."""
    session.check_clean()
    for outcome in session.got:
        assert outcome.multicast_address is None
        assert outcome.num_addresses == len(session.outcomes)
        assert outcome.why_no_multicast == session.got[0].why_no_multicast
        assert why in outcome.why_no_multicast


def _check_all_refused(session, *words):
    """All ranks got the same error."""
    session.check_clean()
    assert {type(outcome) for outcome in session.outcomes} == {DisagreementError}
    assert len({str(outcome) for outcome in session.outcomes}) == 1
    for word in words:
        assert word in str(session.outcomes[0])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_all_ranks_get_all_addresses_and_multicast(monkeypatch, world_size):
    session = share(monkeypatch, world_size)
    session.check_clean()
    for outcome in session.got:
        assert outcome.num_addresses == world_size
        assert outcome.multicast_address % MULTICAST_RECOMMENDED == 0
        assert outcome.why_no_multicast is None
        assert outcome.size == MULTICAST_RECOMMENDED
    assert len(session.model.memories) == world_size


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_without_multicast_no_multicast_call_is_made(monkeypatch, world_size):
    session = share(monkeypatch, world_size, use_multicast=False)
    _check_all_unicast(session, "not asked for")
    assert not any(name.startswith("cuMulticast") for _, name in session.model.trace)
    assert session.got[0].size == 2 * GRANULARITY > NUM_BYTES


def test_calls_of_the_creator_are_in_the_order_that_the_driver_needs(monkeypatch):
    session = share(monkeypatch, 2)
    calls = session.model.calls(0)
    ordered = [
        "cuDeviceCanAccessPeer",
        "cuMemGetAllocationGranularity",
        "cuMulticastGetGranularity",
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemsetD8",
        "cuMulticastCreate",
        "cuMulticastAddDevice",
        "cuMulticastBindMem",
    ]
    first = [calls.index(name) for name in ordered]
    assert first == sorted(first)
    # And down again: unmap and unbind multicast, release its handle, then the unicast memory.
    closing = calls[len(session.made[0]) :]
    undone = [name for name in closing if name.startswith(("cuMem", "cuMulticast"))]
    assert undone == [
        "cuMemUnmap",
        "cuMulticastUnbind",
        "cuMemAddressFree",
        "cuMemRelease",
        *["cuMemUnmap", "cuMemAddressFree"] * 2,
    ]
    assert calls.index("cuCtxSynchronize", len(session.made[0])) < calls.index("cuMulticastUnbind")


@pytest.mark.parametrize(("name", "value"), SWITCHES.items())
def test_a_switch_leaves_unicast_and_no_multicast_call(monkeypatch, name, value):
    session = share(monkeypatch, 2, switches={name: value})
    _check_all_unicast(session, f"{name}={value}")


def test_a_gpu_without_multicast_means_unicast_for_all(monkeypatch):
    session = share(monkeypatch, 2, gpus=[Gpu(), Gpu(has_multicast=False)])
    _check_all_unicast(session, "rank 1: GPU 1 has no NVSwitch multicast")
    assert session.got[0].size == 2 * GRANULARITY  # not rounded for a multicast in vain


def test_two_ranks_on_one_gpu_share_it_without_multicast(monkeypatch):
    session = share(monkeypatch, 2, gpus=[Gpu()], ordinals=[0, 0])
    _check_all_unicast(session, "share a GPU")


def test_no_peer_access_is_refused_before_anything_is_allocated(monkeypatch):
    apart = [Gpu(), Gpu(reaches=frozenset({0})), Gpu(reaches=frozenset({0, 1}))]
    session = share(monkeypatch, 3, gpus=apart)
    _check_all_refused(session, "peer access failed on rank 1: ", "GPU of rank(s) 2", "topo -p2p")
    assert not session.model.memories


def test_devices_are_compared_by_identity_where_ordinals_differ(monkeypatch):
    # Each rank calls its own GPU 0, as a launcher that sets CUDA_VISIBLE_DEVICES per rank makes it.
    apart = [Gpu(reaches=frozenset({1})), Gpu(reaches=frozenset({0})), Gpu()]
    session = share(monkeypatch, 2, gpus=apart, visible=[[0, 1, 2], [1, 2, 0]], ordinals=[0, 0])
    session.check_clean()
    assert all(outcome.multicast_address for outcome in session.got)
    assert session.model.calls(0).count("cuDeviceCanAccessPeer") == 1


def test_a_hidden_gpu_is_taken_for_reachable(monkeypatch):
    session = share(monkeypatch, 2, visible=[[0], [1]], ordinals=[0, 0])
    session.check_clean()
    assert all(outcome.multicast_address for outcome in session.got)
    assert "cuDeviceCanAccessPeer" not in session.model.calls(0)


def test_a_hidden_gpu_that_is_not_reachable_fails_all_ranks_together(monkeypatch):
    apart = [Gpu(), Gpu(reaches=frozenset())]
    session = share(monkeypatch, 2, gpus=apart, visible=[[0], [1]], ordinals=[0, 0])
    _check_all_refused(session, "rank 1: cuMemSetAccess: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")


def test_fabric_handles_travel_where_all_ranks_have_them(monkeypatch):
    session = share(monkeypatch, 4, across_hosts=True)
    session.check_clean()
    assert all(outcome.multicast_address for outcome in session.got)
    assert {memory.handle_type.name for memory in session.model.memories} == {
        "CU_MEM_HANDLE_TYPE_FABRIC"
    }


@pytest.mark.parametrize(
    "options", [{"gpus": [Gpu(), Gpu(has_fabric=False)]}, {"imex": False}], ids=["GPU", "IMEX"]
)
def test_descriptors_serve_one_host_where_a_rank_has_no_fabric_handles(monkeypatch, options):
    session = share(monkeypatch, 2, across_hosts=True, **options)
    session.check_clean()
    assert all(outcome.multicast_address for outcome in session.got)
    assert {memory.handle_type.name for memory in session.model.memories[-2:]} == {
        "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR"
    }


def _put_each_on_a_host_of_its_own(monkeypatch):
    place = devices.place

    def elsewhere(index):
        own = place(index)
        return devices.Place(f"host of {own.device}", own.device)

    monkeypatch.setattr(devices, "place", elsewhere)


@pytest.mark.parametrize("across_hosts", [False, True])
def test_several_hosts_without_fabric_handles_are_refused_at_once(monkeypatch, across_hosts):
    _put_each_on_a_host_of_its_own(monkeypatch)
    session = share(monkeypatch, 2, across_hosts=across_hosts, imex=False)
    reason = "IMEX channel" if across_hosts else "FABRIC handles were not asked for"
    _check_all_refused(session, "several hosts", reason)


def test_several_hosts_share_by_fabric_handles(monkeypatch):
    _put_each_on_a_host_of_its_own(monkeypatch)
    session = share(monkeypatch, 2, across_hosts=True)
    session.check_clean()
    assert all(outcome.multicast_address for outcome in session.got)


def test_one_kernel_and_one_network_make_a_host_or_its_name_where_they_are_hidden(
    monkeypatch, tmp_path
):
    assert devices._host() == devices._host() != platform.node()
    monkeypatch.setattr(devices, "_BOOT_ID", tmp_path / "hidden")
    assert devices._host() == platform.node()


def test_nothing_is_released_once_the_context_is_gone(monkeypatch):
    monkeypatch.setattr(devices, "is_context_alive", lambda _: False)
    session = share(monkeypatch, 2)
    assert not session.model.violations
    assert len(session.model.calls(0)) == len(session.made[0])


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_an_empty_memory_is_refused(monkeypatch, num_bytes):
    session = share(monkeypatch, 2, num_bytes=num_bytes)
    assert [str(outcome) for outcome in session.outcomes] == [
        f"num_bytes is {num_bytes}; it must be at least 1"
    ] * 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "call", ["cuDeviceGetUuid", "cuMemCreate", "cuMulticastAddDevice", "cuMulticastBindMem"]
)
def test_a_rank_that_ends_is_an_error_on_the_others(monkeypatch, call, rank):
    session = share(monkeypatch, 3, faults={(rank, call, 1): KILL})
    session.check_clean()
    survivors = [outcome for r, outcome in enumerate(session.outcomes) if r != rank]
    assert {type(outcome) for outcome in survivors} == {LostRankError}
    assert all(f"[{rank}]" in str(outcome) for outcome in survivors)


@pytest.mark.parametrize("name", ["exchange", "broadcast"])
def test_a_rank_that_ends_in_an_exchange_is_an_error_within_its_deadline(monkeypatch, name):
    exchange = getattr(descriptors, name)

    def dying(*arguments):
        if arguments[1 if name == "exchange" else 2] == 1:
            raise KeyboardInterrupt
        return exchange(*arguments)

    monkeypatch.setattr(descriptors, name, dying)
    monkeypatch.setattr(deadlines, "SHARING_S", 0.3)
    session = share(monkeypatch, 3)
    session.check_clean()
    assert isinstance(session.outcomes[1], KeyboardInterrupt)
    for survivor in (0, 2):
        assert isinstance(session.outcomes[survivor], LostRankError)


def test_a_capture_on_one_rank_is_refused_on_all(monkeypatch):
    capturing = iter((False, True))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: next(capturing))
    session = share(monkeypatch, 2)
    _check_all_refused(session, "a CUDA graph is being captured")


def test_what_ranks_ask_for_must_agree(monkeypatch):
    session = share(monkeypatch, 2, num_bytes=[1 << 20, 2 << 20])
    _check_all_refused(session, "different (num_bytes", "1048576", "2097152")
