"""A tensor-parallel group on several hosts is refused by name if its transport cannot reach."""

import pytest

from sglang_tokenweave import topology
from sglang_tokenweave.topology import Host

A, B, C = (Host(name, f"boot-{name}") for name in ("a", "b", "c"))


@pytest.mark.parametrize("transport", ["auto", "peer", "multicast"])
def test_device_transports_stay_on_a_host(transport):
    assert topology.reason([A, A, A], transport, shares_nvlink_domain=False) is None
    reason = topology.reason([A, A, B, C], transport, shares_nvlink_domain=False)
    assert reason is not None
    assert "on 3 hosts (a, b, c)" in reason
    assert "--pp-size" in reason


def test_device_transports_cross_hosts_in_an_nvlink_domain():
    assert topology.reason([A, B], "peer", shares_nvlink_domain=True) is None


def test_the_reference_goes_wherever_torch_does():
    assert topology.reason([A, B], "reference", shares_nvlink_domain=False) is None


def test_a_host_is_told_by_its_boot_id():
    one_machine = [Host("container-1", "boot"), Host("container-2", "boot")]
    assert topology.reason(one_machine, "peer", shares_nvlink_domain=False) is None
    same_name = [Host("localhost", "boot-1"), Host("localhost", "boot-2")]
    assert "on 2 hosts" in topology.reason(same_name, "peer", shares_nvlink_domain=False)


def test_this_host(tmp_path, monkeypatch):
    assert Host.this() == Host.this()
    monkeypatch.setattr(topology, "_BOOT_ID", tmp_path / "missing")
    host = Host.this()
    assert host.boot_id == host.name != ""
