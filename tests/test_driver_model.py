"""The model of the driver itself: it must catch what it is there to catch."""

import inspect
import os

import pytest
from driver_model import (
    GRANULARITY,
    MULTICAST_MINIMUM,
    MULTICAST_RECOMMENDED,
    POSIX,
    DriverModel,
    RuleViolation,
)
from driver_model import real as cuda
from in_process import HangError, World

SIZE = MULTICAST_RECOMMENDED


def _run(world_size, function, **options):
    """Run `function(model, rank, gather)` on every rank; `model` calls return value or status."""
    world = World(world_size)
    model = DriverModel(world, **options)
    outcomes = world.run(lambda group: function(_Caller(model), group.rank, group.gather))
    return model, outcomes


class _Caller:
    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        def call(*arguments):
            status, *values = getattr(self._model, name)(*arguments)
            if status != cuda.CUresult.CUDA_SUCCESS:
                return status.name
            return values[0] if values else None

        return call


def _memory(driver, ordinal, size=SIZE):
    properties = cuda.CUmemAllocationProp()
    properties.location.id = ordinal
    properties.requestedHandleTypes = POSIX
    return driver.cuMemCreate(size, properties, 0)


def _multicast(driver, num_devices=2, size=SIZE):
    properties = cuda.CUmulticastObjectProp()
    properties.numDevices, properties.size = num_devices, size
    properties.handleTypes = int(POSIX)
    return driver.cuMulticastCreate(properties)


def _obtain(driver, rank, gather, *, release_early=False):
    """Return a handle to rank 0's multicast object; all ranks share one table of descriptors."""
    handle = _multicast(driver) if rank == 0 else None
    descriptor = driver.cuMemExportToShareableHandle(handle, POSIX, 0) if rank == 0 else None
    if release_early and rank == 0:
        driver.cuMemRelease(handle)
    [descriptor, *_] = gather(descriptor)
    if rank != 0 or release_early:
        handle = driver.cuMemImportFromShareableHandle(descriptor, POSIX)
    gather(None)
    if rank == 0:
        os.close(descriptor)
    return handle


def _bind(driver, rank, gather, *, added=(0, 1), **options):
    handle = _obtain(driver, rank, gather, **options)
    if rank in added:
        driver.cuMulticastAddDevice(handle, rank)
    return driver.cuMulticastBindMem(handle, 0, _memory(driver, rank), 0, SIZE, 0)


MODELLED = [name.removeprefix("_") for name in vars(DriverModel) if name.startswith("_cu")]


@pytest.mark.parametrize("name", MODELLED)
def test_each_modelled_call_takes_what_the_real_one_takes(name):
    # The first line of the real function's documentation is its signature.
    listed = getattr(cuda, name).__doc__.partition("(")[2].partition(")")[0]
    real_count = len([each for each in listed.split(",") if each])
    model_count = len(inspect.signature(getattr(DriverModel, f"_{name}")).parameters)
    assert model_count - len(("self", "rank")) == real_count


def test_binding_waits_for_the_others_and_succeeds():
    _, outcomes = _run(2, _bind)
    assert outcomes == [None, None]


def test_binding_without_a_device_hangs():
    _, outcomes = _run(2, lambda *each: _bind(*each, added=(0,)))
    assert all(isinstance(outcome, HangError) for outcome in outcomes)
    assert "rank 1: cuMulticastBindMem" in str(outcomes[0])


def test_a_creator_that_lets_go_early_makes_all_hang():
    # Each late import is an empty object of its own.
    _, outcomes = _run(2, lambda *each: _bind(*each, release_early=True))
    assert all(isinstance(outcome, HangError) for outcome in outcomes)


def test_a_rank_that_ends_while_another_binds_is_a_hang():
    _, outcomes = _run(
        2,
        lambda driver, rank, gather: (
            _bind(driver, rank, gather) if rank == 0 else _obtain(driver, rank, gather)
        ),
    )
    assert isinstance(outcomes[0], HangError)


def _misuses():
    def double_release(driver):
        handle = _memory(driver, 0)
        driver.cuMemRelease(handle)
        driver.cuMemRelease(handle)

    def free_while_mapped(driver):
        address = driver.cuMemAddressReserve(SIZE, 0, 0, 0)
        driver.cuMemMap(address, SIZE, 0, _memory(driver, 0), 0)
        driver.cuMemAddressFree(address, SIZE)

    def double_unmap(driver):
        address = driver.cuMemAddressReserve(SIZE, 0, 0, 0)
        driver.cuMemMap(address, SIZE, 0, _memory(driver, 0), 0)
        driver.cuMemUnmap(address, SIZE)
        driver.cuMemUnmap(address, SIZE)

    def write_without_access(driver):
        address = driver.cuMemAddressReserve(SIZE, 0, 0, 0)
        driver.cuMemMap(address, SIZE, 0, _memory(driver, 0), 0)
        driver.cuMemsetD8(address, 0, SIZE)

    def plain_write_to_multicast(driver):
        handle = _multicast(driver, num_devices=1)
        driver.cuMulticastAddDevice(handle, 0)
        address = driver.cuMemAddressReserve(SIZE, MULTICAST_RECOMMENDED, 0, 0)
        driver.cuMemMap(address, SIZE, 0, handle, 0)
        driver.cuMemsetD8(address, 0, SIZE)

    def import_of_a_closed_descriptor(driver):
        descriptor = driver.cuMemExportToShareableHandle(_memory(driver, 0), POSIX, 0)
        os.close(descriptor)
        driver.cuMemImportFromShareableHandle(descriptor, POSIX)

    def forbidden(driver):
        _multicast(driver)

    return list(locals().values())


@pytest.mark.parametrize("misuse", _misuses(), ids=lambda misuse: misuse.__name__)
def test_misuse_is_a_violation(misuse):
    is_forbidden = misuse.__name__ == "forbidden"
    model, [outcome] = _run(1, lambda driver, *_: misuse(driver), forbidden=is_forbidden)
    assert isinstance(outcome, RuleViolation)
    assert model.violations == [str(outcome)]


def test_what_misses_the_granularity_is_refused():
    def sizes(driver, *_):
        handle = _multicast(driver, num_devices=1)
        driver.cuMulticastAddDevice(handle, 0)
        memory = _memory(driver, 0)
        unaligned = driver.cuMemAddressReserve(SIZE, 0, 0, 0)
        return [
            _memory(driver, 0, GRANULARITY + 1),
            _multicast(driver, size=MULTICAST_MINIMUM // 2),
            driver.cuMulticastBindMem(handle, 0, memory, 0, MULTICAST_MINIMUM // 2, 0),
            driver.cuMulticastBindMem(handle, 0, memory, 0, 2 * SIZE, 0),
            driver.cuMemMap(unaligned, SIZE, 0, handle, 0),
        ]

    _, [outcome] = _run(1, sizes)
    assert outcome == ["CUDA_ERROR_INVALID_VALUE"] * 5


def test_what_is_left_is_seen():
    model, _ = _run(1, lambda driver, *_: _memory(driver, 0))
    assert model.leftovers()
