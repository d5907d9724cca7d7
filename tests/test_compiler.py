"""Compiling device sources on a machine without a GPU: results, resources and errors."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from compiling import KERNEL, SHARED_FLOATS, compile_with, write_sources
from cuda.bindings import nvrtc

from sglang_tokenweave import compiler
from sglang_tokenweave.compiler import CompileError, Resources, architecture, compile_kernel

ARCHITECTURES = ["sm_90a", "sm_100a", "sm_103a", "sm_120a"]


@pytest.fixture
def sources(tmp_path):
    return write_sources(tmp_path)


@pytest.fixture
def compile_(sources, tmp_path):
    return compile_with(sources, tmp_path / "cache")


def skip_if_unsupported(arch):
    _, supported = nvrtc.nvrtcGetSupportedArchs()
    if int(arch.removeprefix("sm_").removesuffix("a")) not in supported:
        pytest.skip(f"NVRTC {nvrtc.nvrtcVersion()[1:]} knows {supported}, not {arch}")


def test_names_of_architectures():
    capabilities = [(9, 0), (10, 0), (10, 3), (12, 0)]
    assert [architecture(*capability) for capability in capabilities] == ARCHITECTURES


@pytest.mark.parametrize("capability", [(8, 0), (9, 1), (12, 1), (0, 9)])
def test_other_architectures_are_refused(capability):
    with pytest.raises(ValueError, match=rf"{capability[0]}\.{capability[1]} .*9\.0, 10\.0, 10\.3"):
        architecture(*capability)


def test_sources_of_a_checkout():
    assert compiler.source_folder() == Path(__file__).resolve().parents[1] / "cuda"


def test_sources_of_an_installed_package(tmp_path):
    """There, the folder `cuda` beside the package is cuda-python's."""
    package = tmp_path / "sglang_tokenweave"
    (package / "cuda").mkdir(parents=True)
    (tmp_path / "cuda").mkdir()
    shutil.copy(compiler.__file__, package)
    spec = importlib.util.spec_from_file_location("installed_compiler", package / "compiler.py")
    installed = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = installed  # dataclasses look their module up
    try:
        spec.loader.exec_module(installed)
        with pytest.raises(FileNotFoundError, match="install sglang-tokenweave again"):
            installed.source_folder()
        (package / "cuda" / "allreduce_rmsnorm.cu").touch()
        assert installed.source_folder() == package.resolve() / "cuda"
    finally:
        del sys.modules[spec.name]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(compile_, arch):
    skip_if_unsupported(arch)
    compiled = compile_(arch=arch)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert compiled.name.startswith("_Z")
    assert b"\0" + compiled.name.encode() + b"\0" in compiled.cubin
    assert f".target {arch}" in compiled.ptx
    assert f".entry {compiled.name}(" in compiled.ptx


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resources(compile_, arch):
    skip_if_unsupported(arch)
    frugal = compile_(arch=arch).resources
    assert 0 < frugal.registers <= 255
    shared = SHARED_FLOATS * 4
    assert frugal == Resources(frugal.registers, 0, 0, stack_bytes=0, shared_bytes=shared)
    hoarding = compile_("hoard<Half, 4>", arch).resources
    assert min(hoarding.spill_stores_bytes, hoarding.spill_loads_bytes) >= 256
    assert hoarding.stack_bytes >= 256
    assert hoarding.registers <= 64
    assert hoarding.shared_bytes == 0


def test_resources_are_those_of_the_named_kernel_and_its_callees():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1a' for 'sm_90a'
ptxas info    : Function properties for _Z1a
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 48 bytes cumulative stack size, 96 bytes smem
ptxas info    : Compile time = 25.104 ms
ptxas info    : Function properties for _Z6callee
ptxas         .     32 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads
ptxas info    : Compiling entry function '_Z1ab' for 'sm_90a'
ptxas info    : Function properties for _Z1ab
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 72 registers, used 0 barriers
"""
    assert compiler._resources(log, "_Z1a") == Resources(40, 16, 32, 48, 96)
    assert compiler._resources(log, "_Z1ab") == Resources(72, 0, 0, 0, 0)
    assert compiler._resources(log, "_Z1c") is None


def test_defines_reach_the_source(compile_):
    texts = {compile_(defines={"FACTOR": factor}).ptx for factor in (3, "4")}
    assert len(texts | {compile_().ptx}) == 3


def test_errors_name_file_line_and_architecture(compile_, sources):
    (sources / "kernel.cu").write_text(KERNEL + "int f() { return missing; }\n")
    line = KERNEL.count("\n") + 1
    with pytest.raises(CompileError, match=rf'kernel\.cu\({line}\): error: .*"missing"') as error:
        compile_()
    assert "sm_90a" in str(error.value)
    assert "scale<Half, 4>" in str(error.value)


def test_errors_of_a_header_name_it(compile_, sources):
    (sources / "params.cuh").write_text("\n\n#error not today\n")
    with pytest.raises(CompileError, match=r"params\.cuh\(3\): .*not today"):
        compile_()


def test_unknown_kernels_and_architectures_are_refused(compile_):
    with pytest.raises(CompileError, match="absent"):
        compile_("absent<Half, 4>")
    with pytest.raises(CompileError, match="sm_10a"):
        compile_(arch="sm_10a")
    with pytest.raises(FileNotFoundError, match=r"absent\.cu"):
        compile_kernel("absent.cu", "scale<Half, 4>", "sm_90a")


def test_missing_packages_are_named(compile_, monkeypatch):
    def no_library():
        raise RuntimeError("Failure finding libnvrtc.so")

    compiler._compiler_identity.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "nvrtcVersion", no_library)
        with pytest.raises(CompileError, match=r"(?s)libnvrtc\.so.*nvidia-cuda-nvrtc"):
            compile_()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
        with pytest.raises(CompileError, match="cuda-bindings"):
            compile_()
    assert compile_().cubin  # a failed look for the library is not remembered
