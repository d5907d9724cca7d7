"""Compiling device sources on a machine without a GPU, and keeping the results on disk."""

import importlib.util
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from cuda.bindings import nvrtc

from sglang_tokenweave import compiler
from sglang_tokenweave.compiler import CompileError, Resources, architecture, compile_kernel

SHARED_FLOATS = 768
KERNEL = f"""
#include "params.cuh"

struct Half {{}};

template <typename T, int kRounds>
__global__ void __launch_bounds__(256) scale(const __grid_constant__ Params p) {{
    __shared__ float tile[{SHARED_FLOATS}];
    tile[threadIdx.x] = p.x[threadIdx.x] * FACTOR;
    __syncthreads();
    for (int i = 0; i < kRounds; ++i) p.x[i * 256 + threadIdx.x] = tile[(threadIdx.x + i) % 256];
}}

// 256 values of one thread stay alive, but a thread may have 32 registers.
template <typename T, int kRounds>
__global__ void __launch_bounds__(1024, 2) hoard(const __grid_constant__ Params p) {{
    float values[256];
#pragma unroll
    for (int i = 0; i < 256; ++i) values[i] = p.x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 256; ++i) p.x[i * 1024 + threadIdx.x] = values[(i * 7) % 256] * values[i];
}}
"""
HEADER = "#pragma once\nstruct Params { float* x; };\n#ifndef FACTOR\n#define FACTOR 2\n#endif\n"
ARCHITECTURES = ["sm_90a", "sm_100a", "sm_103a", "sm_120a"]


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources with a blank"
    folder.mkdir()
    (folder / "kernel.cu").write_text(KERNEL)
    (folder / "params.cuh").write_text(HEADER)
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def compile_(sources, cache):
    """Return `compile_kernel` with defaults for all of its arguments."""

    def compile_it(expression="scale<Half, 4>", arch="sm_90a", **options):
        options = {"sources": sources, "cache": cache, **options}
        return compile_kernel("kernel.cu", expression, arch, **options)

    return compile_it


@pytest.fixture
def compilations(monkeypatch):
    """Return a list that grows by one with each run of the compiler."""
    compiler._compiler_identity()  # once per process, and no kernel
    runs = []
    original = nvrtc.nvrtcCompileProgram

    def spy(program, count, options):
        runs.append(options)
        return original(program, count, options)

    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", spy)
    return runs


@pytest.fixture(autouse=True)
def _warnings_start_anew(caplog):
    compiler._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger=compiler.__name__)


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


def test_failures_leave_nothing_in_the_cache(compile_, cache):
    with pytest.raises(CompileError):
        compile_("absent<Half, 4>")
    assert not list(cache.iterdir())


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


def test_second_time_comes_from_the_cache(compile_, compilations, cache, caplog):
    first = compile_()
    assert compile_() == first
    assert len(compilations) == 1
    assert len(list(cache.iterdir())) == 1
    assert not caplog.records


def test_whatever_decides_the_result_is_in_the_key(compile_, compilations, sources, cache):
    changes = [
        compile_,
        lambda: compile_(defines={"FACTOR": 3}),
        lambda: compile_(defines={"FACTOR": 4}),
        lambda: compile_(arch="sm_100a"),
        lambda: compile_("scale<Half, 5>"),
        lambda: (sources / "params.cuh").write_text(HEADER + "// changed\n") and compile_(),
        lambda: (sources / "new.cuh").write_text("") or compile_(),
        lambda: (sources / "kernel.cu").write_text(KERNEL + "// changed\n") and compile_(),
    ]
    for number, change in enumerate(changes, start=1):
        change()
        assert len(compilations) == number
    assert len(list(cache.iterdir())) == len(changes)
    (sources / "README.md").write_text("No code.")
    (sources / "other.cu").write_text("// No header.")
    compile_()
    assert len(compilations) == len(changes)


def test_another_compiler_misses(compile_, compilations, monkeypatch):
    compile_()
    monkeypatch.setattr(compiler, "_compiler_identity", lambda: "release 13.0, V13.0.89")
    compile_()
    assert len(compilations) == 2


def forged(content):
    """Return another header under a checksum that does not know the key."""
    _, header, cubin = content.split(b"\n", 2)
    body = json.dumps({**json.loads(header), "name": "other"}).encode() + b"\n" + cubin
    return sha256(body).hexdigest().encode() + b"\n" + body


DAMAGES = {
    "empty": lambda content: b"",
    "no newline": lambda content: content[:40],
    "only a checksum": lambda content: content[:65],
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "garbage": lambda content: b"\x80\x04\n\xff\n" * 99,
    "forged": forged,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_replaced(compile_, compilations, cache, caplog, damage):
    good = compile_()
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    entry.write_bytes(DAMAGES[damage](content))
    assert compile_() == good
    assert len(compilations) == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(entry) in record.message
    assert entry.read_bytes() == content
    assert compile_() == good
    assert len(compilations) == 2
    assert list(cache.iterdir()) == [entry]


def test_an_entry_under_another_name_is_not_taken(compile_, compilations, cache, caplog):
    compile_("scale<Half, 5>")
    (other,) = cache.iterdir()
    good = compile_()
    (entry,) = set(cache.iterdir()) - {other}
    shutil.copy(other, entry)
    assert compile_() == good
    assert len(compilations) == 3
    assert "damaged or foreign" in caplog.text


def test_an_entry_that_is_a_folder_does_no_harm(compile_, cache, caplog):
    good = compile_()
    (entry,) = cache.iterdir()
    entry.unlink()
    entry.mkdir()
    assert compile_() == compile_() == good
    assert len(caplog.records) == 2  # it cannot be read; it cannot be replaced
    assert list(cache.iterdir()) == [entry]


def test_cache_of_the_user(compile_, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "xdg" / "sglang_tokenweave" / "kernels"
    assert compiler.default_cache() == folder
    compile_(cache=None)
    (entry,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        at_home = tmp_path / "home" / ".cache" / "sglang_tokenweave" / "kernels"
        assert compiler.default_cache() == at_home


def test_a_user_without_a_home_compiles_without_a_cache(compile_, monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert compile_(cache=None) == compile_(cache=None)
    assert [record.message for record in caplog.records] == [
        "compiling without a cache: Could not determine home directory."
    ]


def test_a_cache_below_a_file_is_warned_of_once(compile_, tmp_path, caplog):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "cache"
    assert compile_(cache=below) == compile_(cache=below)
    compile_("scale<Half, 5>", cache=below)
    assert len(caplog.records) == 1
    assert str(below) in caplog.text


def test_a_cache_of_somebody_else_is_refused(compile_, compilations, cache, caplog):
    if os.geteuid() == 0:
        compile_()  # a good entry, but in a folder that another user then owns
        os.chown(cache, 65534, -1)
    else:
        cache = Path("/usr")
    before = len(compilations)
    assert compile_(cache=cache) == compile_(cache=cache)
    assert len(compilations) == before + 2
    assert len(caplog.records) == 1
    assert f"{cache} belongs to uid " in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_an_entry_of_somebody_else_is_replaced(compile_, compilations, cache, caplog):
    good = compile_()
    (entry,) = cache.iterdir()
    os.chown(entry, 65534, -1)
    assert compile_() == good
    assert len(compilations) == 2
    assert "damaged or foreign" in caplog.text
    assert entry.stat().st_uid == 0


CHILD = """
import os, resource, sys
from pathlib import Path
from sglang_tokenweave import compiler
from sglang_tokenweave.compiler import compile_kernel

def compile_it(cache, rounds=4):
    expression = f"scale<Half, {rounds}>"
    return compile_kernel("kernel.cu", expression, "sm_90a", sources=Path("."), cache=cache)
"""


def start_child(code, folder):
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_child(code, folder):
    """Return what a process with a broken cache says; the last resort of `logging` prints it."""
    child = start_child(code, folder)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 0, said
    return said.splitlines()


def test_a_read_only_cache_is_warned_of_once(sources):
    code = """
folder = Path("cache")
good = compile_it(folder)
compiler._compile = lambda *_: good  # another user may not get at NVRTC or the test's folder
if os.geteuid() == 0:
    for path in (folder, *folder.iterdir()):
        os.chown(path, 65534, -1)
folder.chmod(0o500)
if os.geteuid() == 0:
    os.setuid(65534)
assert compile_it(folder) == good  # what is there may be read
compile_it(folder, 5)
compile_it(folder, 6)
assert len(list(folder.iterdir())) == 1
"""
    (warning,) = run_child(code, sources)
    assert warning == "compiled kernels are not kept: cache: Permission denied"


def test_a_full_disk_is_warned_of_once(sources):
    code = """
folder = Path("cache")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
assert compile_it(folder).cubin
assert compile_it(folder, 5).cubin
assert not list(folder.iterdir())
"""
    (warning,) = run_child(code, sources)
    assert warning == "compiled kernels are not kept: cache: File too large"


def test_processes_race_on_a_cold_cache(sources):
    code = """
from hashlib import sha256
compiler._compiler_identity()
print("ready", flush=True)
sys.stdin.readline()
compiled = compile_it(Path("cache"))
print(sha256(compiled.cubin).hexdigest(), compiled.name, compiled.resources)
"""
    children = [start_child(code, sources) for _ in range(8)]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n", child.communicate()[1]
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        results = [child.communicate(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * 8, results
    assert {said for _, said in results} == {""}
    assert len({printed for printed, _ in results}) == 1
    (entry,) = (sources / "cache").iterdir()
    assert entry.suffix == ".kernel"
