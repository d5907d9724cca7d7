"""Every driver call of every rank fails once: all ranks end alike, nothing hangs or is left."""

import pytest
from sharing_ranks import UNDOING, share

from sglang_tokenweave.agreement import DisagreementError

# What the driver answers on machines in a bad state; the rest of the calls fail with UNKNOWN.
ERRORS = {
    "cuMulticastCreate": ("NOT_SUPPORTED", "ILLEGAL_STATE", "SYSTEM_NOT_READY"),
    "cuMulticastAddDevice": ("INVALID_DEVICE", "ILLEGAL_STATE", "SYSTEM_NOT_READY"),
    "cuMulticastBindMem": ("ILLEGAL_STATE", "INVALID_VALUE", "SYSTEM_NOT_READY", "OUT_OF_MEMORY"),
}
RETRIED = tuple(ERRORS)


def _good_run(world_size, **options):
    with pytest.MonkeyPatch.context() as monkeypatch:
        session = share(monkeypatch, world_size, **options)
    session.check_clean()
    return session


def _calls(world_size, **options):
    """Return (rank, call, n, index, calls until made, all calls) of each call of a good run."""
    session = _good_run(world_size, **options)
    for rank, outcome in enumerate(session.got):
        assert outcome.multicast_address
        calls = session.model.calls(rank)
        for index, name in enumerate(calls):
            yield rank, name, calls[: index + 1].count(name), index, session.made[rank], calls


def _expected(name, index, made, calls):
    """Return what a failure of this call must lead to, on all ranks."""
    if name in UNDOING or index >= len(made):
        return "as without"
    # A device is looked up for the call that follows.
    cause = calls[index + 1] if name == "cuDeviceGet" else name
    zeroed = calls.index("cuCtxSynchronize")
    if cause.startswith("cuMulticast") or cause == "cuDeviceGetAttribute" or index > zeroed:
        return "unicast"
    return "refused"


def _cases(world_size, **options):
    for rank, name, n, index, made, calls in _calls(world_size, **options):
        for error in ERRORS.get(name, ("UNKNOWN",)):
            expected = _expected(name, index, made, calls)
            yield pytest.param(
                world_size,
                rank,
                name,
                n,
                error,
                expected,
                id=f"{world_size}-{rank}-{name}-{n}-{error}",
            )


def _check(session, rank, name, expected):
    assert not session.model.violations
    assert session.leaked_descriptors == 0
    if expected == "as without":
        assert all(got.multicast_address for got in session.got)
        return
    assert not session.model.leftovers()
    if expected == "unicast":
        assert not any(got.multicast_address for got in session.got)
        texts = {got.why_no_multicast for got in session.got}
    else:
        assert {type(outcome) for outcome in session.outcomes} == {DisagreementError}
        texts = {str(outcome) for outcome in session.outcomes}
    [text] = texts
    assert f"rank {rank}: {name}: CUDA_ERROR_" in text


@pytest.mark.parametrize(
    ("world_size", "rank", "name", "n", "error", "expected"), [*_cases(2), *_cases(4)]
)
def test_one_failure_ends_alike_on_all_ranks(
    monkeypatch, world_size, rank, name, n, error, expected
):
    retries = 4 if name in RETRIED and error == "SYSTEM_NOT_READY" else 1
    faults = {(rank, name, n + retry): error for retry in range(retries)}
    session = share(monkeypatch, world_size, faults=faults)
    _check(session, rank, name, expected)


@pytest.mark.parametrize("name", RETRIED)
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1, 2, 3)], ids=str)
def test_a_transient_failure_succeeds_on_all_ranks(monkeypatch, ranks, name):
    faults = {(rank, name, 1): "SYSTEM_NOT_READY" for rank in ranks}
    session = share(monkeypatch, 4, faults=faults)
    session.check_clean()
    assert all(got.multicast_address for got in session.got)


def test_only_the_ranks_that_failed_try_again(monkeypatch):
    session = share(monkeypatch, 2, faults={(1, "cuMulticastBindMem", 1): "SYSTEM_NOT_READY"})
    assert session.model.calls(0).count("cuMulticastBindMem") == 1
    assert session.model.calls(1).count("cuMulticastBindMem") == 2


def test_a_transient_failure_beside_another_one_is_not_tried_again(monkeypatch):
    faults = {
        (0, "cuMulticastBindMem", 1): "SYSTEM_NOT_READY",
        (1, "cuMulticastBindMem", 1): "ILLEGAL_STATE",
    }
    session = share(monkeypatch, 2, faults=faults)
    session.check_clean()
    for got in session.got:
        assert "rank 0: cuMulticastBindMem: CUDA_ERROR_SYSTEM_NOT_READY" in got.why_no_multicast
        assert "rank 1: cuMulticastBindMem: CUDA_ERROR_ILLEGAL_STATE" in got.why_no_multicast
    assert session.model.calls(0).count("cuMulticastBindMem") == 1


def test_no_other_failure_is_tried_again(monkeypatch):
    faults = {(0, "cuMemCreate", 1): "SYSTEM_NOT_READY"}
    session = share(monkeypatch, 2, faults=faults)
    session.check_clean()
    assert {type(outcome) for outcome in session.outcomes} == {DisagreementError}
    assert session.model.calls(0).count("cuMemCreate") == 1


@pytest.mark.parametrize(
    ("rank", "name", "n"),
    [(rank, name, n) for rank, name, n, *_ in _calls(2, across_hosts=True) if "Shareable" in name],
)
def test_a_failure_with_fabric_handles_ends_alike(monkeypatch, rank, name, n):
    faults = {(rank, name, n): "NOT_PERMITTED"}
    session = share(monkeypatch, 2, across_hosts=True, faults=faults)
    session.check_clean()
    assert len({type(outcome) for outcome in session.outcomes}) == 1
    texts = {getattr(it, "why_no_multicast", None) or str(it) for it in session.outcomes}
    if n == 1 and name == "cuMemExportToShareableHandle":  # the probe: descriptors do as well
        assert all(got.multicast_address for got in session.got)
    else:
        [text] = texts
        assert f"rank {rank}: {name}: CUDA_ERROR_NOT_PERMITTED" in text
        assert "IMEX channel" in text
