"""Device sources to compile, in this process with defaults or in a child with a broken cache."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from sglang_tokenweave.compiler import compile_kernel, source_folder

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
CHILD = """
import os, resource, sys
from pathlib import Path
from sglang_tokenweave import compiler
from sglang_tokenweave.compiler import compile_kernel

def compile_it(cache, rounds=4):
    expression = f"scale<Half, {rounds}>"
    return compile_kernel("kernel.cu", expression, "sm_90a", sources=Path("."), cache=cache)
"""


def write_sources(tmp_path):
    """Write the sources to a folder of their own, and return it."""
    folder = tmp_path / "sources with a blank"
    folder.mkdir()
    (folder / "kernel.cu").write_text(KERNEL)
    (folder / "params.cuh").write_text(HEADER)
    return folder


def check_layout(file, params, folder, members=None):
    """Compile static_asserts that `Params` of a source is laid out as a ctypes structure.

    Args:
        members: where fields of the structure are that the source has elsewhere, by their names.
    """
    members = members or {}
    checks = "".join(
        f"static_assert(__INTADDR__(&((Params*)0)->{members.get(name, name)}) == "
        f"{getattr(params, name).offset});\n"
        for name, _ in params._fields_
    )
    for source in source_folder().glob("*.cu*"):
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / "layout.cu").write_text(
        f'#include "{file}"\nstatic_assert(sizeof(Params) == {ctypes.sizeof(params)});\n{checks}'
        "template <int kUnused> __global__ void layout() {}\n"
    )
    compile_kernel("layout.cu", "layout<0>", "sm_90a", sources=folder, cache=folder / "cache")


def compile_with(sources, cache):
    """Return `compile_kernel` with defaults for all of its arguments."""

    def compile_it(expression="scale<Half, 4>", arch="sm_90a", **options):
        options = {"sources": sources, "cache": cache, **options}
        return compile_kernel("kernel.cu", expression, arch, **options)

    return compile_it


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
