"""Calls of the driver: the operator's switches, errors with their remedies, releases."""

import ast
import ctypes
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from cuda.bindings import driver as real

import sglang_tokenweave
from sglang_tokenweave import driver
from sglang_tokenweave.remedies import remedy
from sglang_tokenweave.switches import why_multicast_is_forbidden

DISABLING = ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")
CALLS = [name for name in dir(real) if name.startswith("cuMulticast")]


@pytest.fixture
def bindings(monkeypatch):
    """Let every driver function succeed, and note the calls."""
    calls = []

    class Bindings:
        CUresult = real.CUresult
        answer = (real.CUresult.CUDA_SUCCESS,)

        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, *arguments)) or self.answer

    found = Bindings()
    found.calls = calls
    monkeypatch.setattr(driver, "bindings", lambda: found)
    for name in ("NCCL_NVLS_ENABLE", *DISABLING):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize("value", ["0", " 0 ", "00", "0x0", "no", "FALSE", "off", "zero", "1.0"])
def test_nccl_nvls_enable_forbids_with_a_no_and_with_what_cannot_be_read(value):
    environment = {"NCCL_NVLS_ENABLE": value}
    assert why_multicast_is_forbidden(environment) == f"NCCL_NVLS_ENABLE={value.strip()}"


@pytest.mark.parametrize("value", ["", " ", "1", "2", "-1"])
def test_nccl_nvls_enable_allows_with_other_numbers(value):
    assert why_multicast_is_forbidden({"NCCL_NVLS_ENABLE": value}) is None


@pytest.mark.parametrize("name", DISABLING)
@pytest.mark.parametrize("value", ["1", "2", "true", "YES", "on", "ja", "1.0"])
def test_disabling_switches_forbid_with_anything_but_a_no(name, value):
    assert why_multicast_is_forbidden({name: value}) == f"{name}={value}"


@pytest.mark.parametrize("name", DISABLING)
@pytest.mark.parametrize("value", ["", "0", "false", "No", "off", "n", "F"])
def test_disabling_switches_allow_with_a_no(name, value):
    assert why_multicast_is_forbidden({name: value}) is None


def test_one_switch_is_enough():
    environment = {"NCCL_NVLS_ENABLE": "1", "NVSHMEM_DISABLE_NVLS": "1"}
    assert why_multicast_is_forbidden(environment) == "NVSHMEM_DISABLE_NVLS=1"
    assert why_multicast_is_forbidden({}) is None


def test_cuda_python_has_the_calls_that_are_guarded():
    assert {"cuMulticastCreate", "cuMulticastBindMem", "cuMulticastUnbind"} <= set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_while_a_switch_is_set_no_multicast_function_is_called(bindings, monkeypatch, name):
    driver.call(name, 1)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    with pytest.raises(driver.MulticastForbiddenError, match=f"{name}.* NCCL_NVLS_ENABLE=0"):
        driver.call(name, 2)
    with ExitStack() as stack:
        driver.on_exit(stack, name, 3)
    driver.call("cuMemRelease", 4)
    assert bindings.calls == [(name, 1), ("cuMemRelease", 4)]
    monkeypatch.delenv("NCCL_NVLS_ENABLE")
    with ExitStack() as stack:
        driver.on_exit(stack, name, 5)
    assert bindings.calls[-1] == (name, 5)


def test_every_driver_function_is_called_in_one_place():
    # A function taken from the bindings anywhere else would go around the switches.
    for path in Path(sglang_tokenweave.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        taken = [
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr[:2] == "cu"
            and node.attr[2:3].isupper()
        ]
        assert not taken, f"{path.name}: use driver.call"
        dynamic = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and getattr(node.func, "id", None) == "getattr"
            and ast.unparse(node.args[0]) in ("bindings()", "driver.bindings()")
        ]
        assert len(dynamic) == (path.name == "driver.py"), path.name


def test_values_are_unwrapped(bindings):
    success = real.CUresult.CUDA_SUCCESS
    for answer, value in [((success,), None), ((success, 1), 1), ((success, 1, 2), (1, 2))]:
        bindings.answer = answer
        assert driver.call("cuInit", 0) == value


class Nothing(ctypes.Structure):
    _fields_ = ()


@pytest.mark.parametrize("starts_early", [False, True])
@pytest.mark.parametrize("in_pairs", [False, True])
def test_a_kernel_is_launched_in_pairs_or_early_as_told(monkeypatch, in_pairs, starts_early):
    calls = []
    monkeypatch.setattr(driver, "call", lambda name, *arguments: calls.append((name, arguments)))
    kernel = driver.Kernel("function", 1024, 0, None)
    kernel.launch(0, 18, Nothing(), in_pairs=in_pairs, starts_early=starts_early)
    ((name, (config, function, *_)),) = calls
    ids = real.CUlaunchAttributeID
    expected = [ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION] * in_pairs
    expected += [ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION] * starts_early
    assert (name, function, config.gridDimX) == ("cuLaunchKernelEx", "function", 18)
    assert config.numAttrs == len(expected)
    assert [attribute.id for attribute in config.attrs] == expected
    if in_pairs:
        assert config.attrs[0].value.clusterDim.x == 2
    if starts_early:
        assert config.attrs[-1].value.programmaticStreamSerializationAllowed == 1


@pytest.mark.parametrize(
    ("call", "error", "advice"),
    [
        ("cuMemCreate", "NOT_PERMITTED", "/dev/nvidia-caps-imex-channels"),
        ("cuMemImportFromShareableHandle", "NOT_PERMITTED", "same channel"),
        ("cuMulticastCreate", "NOT_SUPPORTED", "confidential computing"),
        ("cuMulticastBindMem", "ILLEGAL_STATE", "nvidia-fabricmanager"),
        ("cuMulticastBindMem", "SYSTEM_NOT_READY", "nvidia-fabricmanager"),
        ("cuMulticastBindMem", "INVALID_VALUE", "without resetting the GPUs"),
        ("cuMulticastBindMem", "OUT_OF_MEMORY", "multicast object"),
        ("cuMulticastAddDevice", "INVALID_DEVICE", "one NVLink domain"),
        ("cuDeviceGet", "INVALID_DEVICE", "CUDA_VISIBLE_DEVICES"),
        ("cuInit", "NO_DEVICE", "--gpus"),
        ("cuMemCreate", "OUT_OF_MEMORY", "--mem-fraction-static"),
        ("cuMemMap", "INVALID_VALUE", "granularity"),
        ("cuMemSetAccess", "PEER_ACCESS_UNSUPPORTED", "topo -p2p"),
    ],
)
def test_an_error_names_call_error_and_remedy(bindings, call, error, advice):
    status = getattr(real.CUresult, f"CUDA_ERROR_{error}")
    bindings.answer = (status, None)
    with pytest.raises(driver.CudaError) as caught:
        driver.call(call)
    assert str(caught.value).startswith(f"{call}: CUDA_ERROR_{error} ({int(status)}); ")
    assert advice in str(caught.value)
    assert caught.value.error == status.name


def test_an_error_without_remedy_names_call_and_error(bindings):
    bindings.answer = (real.CUresult.CUDA_ERROR_UNKNOWN,)
    with pytest.raises(driver.CudaError, match=r"^cuInit: CUDA_ERROR_UNKNOWN \(999\)$"):
        driver.call("cuInit", 0)


def test_remedies_are_for_errors_that_exist():
    from sglang_tokenweave.remedies import _REMEDIES

    for prefix, error, text in _REMEDIES:
        assert hasattr(real.CUresult, f"CUDA_ERROR_{error}")
        assert any(name.startswith(prefix) for name in dir(real) if name.startswith("cu"))
        assert remedy(f"{prefix}", f"CUDA_ERROR_{error}") == text


def test_a_release_that_fails_does_not_stop_the_others(bindings):
    bindings.answer = (real.CUresult.CUDA_ERROR_UNKNOWN,)
    with ExitStack() as stack:
        driver.on_exit(stack, "cuMemRelease", 1)
        driver.on_exit(stack, "cuMemUnmap", 2, 3)
    assert bindings.calls == [("cuMemUnmap", 2, 3), ("cuMemRelease", 1)]


def test_a_machine_without_the_driver_is_a_named_error(monkeypatch):
    def missing(*_):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(driver, "bindings", lambda: SimpleNamespace(cuInit=missing))
    with pytest.raises(driver.CudaError, match=r"cuInit: Failed to dlopen libcuda\.so\.1"):
        driver.call("cuInit", 0)
    with pytest.raises(driver.CudaError, match="cuda-python has no cuNew"):
        driver.call("cuNew")
