"""Device source -> cubin with NVRTC, once per machine: results are kept on disk.

No CUDA toolkit is needed, only the compiler library; nothing here touches a GPU.
"""

import functools
import hashlib
import importlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_tokenweave import user_cache

logger = logging.getLogger(__name__)

# "a": the instructions of exactly this architecture, which its successors may lack.
ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a", (12, 0): "sm_120a"}

_FORMAT = 1  # of cache entries: raise it when their content changes
# With -v, ptxas writes registers and spills into the log. Line numbers cost nothing at run time.
# NVRTC's own cache answers without a log, and the log is where the resources are read from.
_OPTIONS = ("--std=c++20", "-lineinfo", "--ptxas-options=-v", "--no-cache")
_HEADER_SUFFIXES = {".cuh", ".h", ".hpp", ".inl"}


class CompileError(RuntimeError):
    """NVRTC is missing or refused a kernel; the text holds its whole log."""


@dataclass(frozen=True)
class Resources:
    """What a kernel takes, as ptxas reports it: its own and that of the functions it calls."""

    registers: int  # per thread
    spill_stores_bytes: int  # per thread
    spill_loads_bytes: int  # per thread
    stack_bytes: int  # per thread
    shared_bytes: int  # per block, without the dynamic part


@dataclass(frozen=True)
class Compiled:
    """A kernel ready to be loaded."""

    cubin: bytes
    name: str  # the symbol in the cubin
    resources: Resources
    ptx: str | None


def source_folder() -> Path:
    """Return the folder of the device sources: of a checkout, or inside the installed package.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    # Beside an installed package, `cuda` is the folder of cuda-python.
    folders = [package / "cuda", package.parent / "cuda"]
    for folder in folders:
        if (folder / "allreduce_rmsnorm.cu").is_file():
            return folder
    raise FileNotFoundError(
        f"allreduce_rmsnorm.cu is neither in {folders[0]} nor in {folders[1]}: "
        "install sglang-tokenweave again"
    )


def architecture(major: int, minor: int) -> str:
    """Return NVRTC's name for a compute capability.

    Raises:
        ValueError: there is no kernel for it.
    """
    if (major, minor) not in ARCHITECTURES:
        supported = ", ".join(f"{a}.{b}" for a, b in ARCHITECTURES)
        raise ValueError(f"compute capability {major}.{minor} is not among {supported}")
    return ARCHITECTURES[major, minor]


def compile_kernel(
    file: str,
    expression: str,
    arch: str,
    *,
    defines: Mapping[str, str | int] = {},
    sources: Path | None = None,
    cache: Path | None = None,
) -> Compiled:
    """Compile one kernel, or take it from the cache. Any number of processes may do so at once.

    Args:
        file: name of a file in `sources`.
        expression: names the kernel as C++ does: `allreduce_rmsnorm<Bf16, 2, 4>`.
        arch: as `architecture` returns it.
        defines: preprocessor macros.
        sources: folder of the file and its headers; None: `source_folder()`.
        cache: folder of compiled kernels; None: `default_cache()`.

    Raises:
        CompileError: NVRTC is missing, or it did not accept the kernel.
        FileNotFoundError: there is no such file.
    """
    sources = sources or source_folder()
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    options = [f"--gpu-architecture={arch}", *_OPTIONS, *macros]
    key = _key(sources, file, expression, options)
    folder = _usable_cache(cache)
    compiled = _load(folder, key) if folder else None
    if compiled is None:
        compiled = _compile(sources, file, expression, options)
        if folder:
            _publish(folder, key, compiled)
    return compiled


def default_cache() -> Path:
    """Return the folder where this user's compiled kernels are kept.

    Raises:
        RuntimeError: this user has no home folder.
    """
    return user_cache.folder("kernels")


def _key(sources: Path, file: str, expression: str, options: list[str]) -> str:
    headers = [path for path in sources.rglob("*") if path.suffix in _HEADER_SUFFIXES]
    digests = {
        path.relative_to(sources).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [sources / file, *headers]
    }
    parts = [_FORMAT, _compiler_identity(), file, expression, options, digests]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _compile(sources: Path, file: str, expression: str, options: list[str]) -> Compiled:
    nvrtc = _nvrtc()
    path = sources / file
    program = _call("nvrtcCreateProgram", path.read_bytes(), os.fsencode(path), 0, None, None)
    try:
        _call("nvrtcAddNameExpression", program, expression.encode())
        arguments = [os.fsencode(option) for option in [f"-I{sources}", *options]]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        log = _text(program, "ProgramLog")
        what = f"{expression} of {path} with {' '.join(options)}"
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"nvrtcCompileProgram: {result.name} for {what}:\n{log}")
        logger.debug("compiled %s:\n%s", what, log)
        name = _call("nvrtcGetLoweredName", program, expression.encode()).decode()
        resources = _resources(log, name)
        if resources is None:
            raise CompileError(f"ptxas did not say what {name} takes, for {what}:\n{log}")
        ptx = _text(program, "PTX") or None
        return Compiled(_output(program, "CUBIN"), name, resources, ptx)
    finally:
        _call("nvrtcDestroyProgram", program)


def _resources(log: str, name: str) -> Resources | None:
    # From this kernel to the next one; the functions that it calls, but not inline, are between.
    _, _, rest = log.partition(f"Compiling entry function '{name}'")
    section, _, _ = rest.partition("Compiling entry function")
    if not re.search(r"Used \d+ registers", section):
        return None

    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, section))

    return Resources(
        registers=total(r"Used (\d+) registers"),
        spill_stores_bytes=total(r"(\d+) bytes spill stores"),
        spill_loads_bytes=total(r"(\d+) bytes spill loads"),
        stack_bytes=total(r"(\d+) bytes cumulative stack size"),
        shared_bytes=total(r"(\d+) bytes smem"),
    )


def _nvrtc() -> Any:
    # Any, and by name: cuda-bindings has no type stubs and machines without a GPU may lack it.
    try:
        return importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise CompileError(
            f"kernels are compiled through the package cuda-bindings, but: {error}; "
            "install it: pip install cuda-bindings nvidia-cuda-nvrtc"
        ) from error


@functools.cache
def _compiler_identity() -> str:
    """Return what NVRTC writes into an empty program: nvrtcVersion leaves the patch level out."""
    nvrtc = _nvrtc()
    try:
        nvrtc.nvrtcVersion()  # loads the library
    except RuntimeError as error:
        raise CompileError(
            f"kernels are compiled with NVRTC, but its library does not load: {error}; "
            "install the package nvidia-cuda-nvrtc in the version of cuda-bindings: "
            "pip install nvidia-cuda-nvrtc"
        ) from error
    program = _call("nvrtcCreateProgram", b"", b"empty.cu", 0, None, None)
    try:
        _call("nvrtcCompileProgram", program, 0, [])
        return _text(program, "PTX")
    finally:
        _call("nvrtcDestroyProgram", program)


def _call(function: str, *arguments: Any) -> Any:
    nvrtc = _nvrtc()
    result, *values = getattr(nvrtc, function)(*arguments)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{function}: {result.name}")
    return values[0] if values else None


def _output(program: Any, what: str) -> bytes:
    # Not bytes: NVRTC writes into the buffer, and Python shares bytes objects of length 1.
    buffer = bytearray(_call(f"nvrtcGet{what}Size", program))
    _call(f"nvrtcGet{what}", program, buffer)
    return bytes(buffer)


def _text(program: Any, what: str) -> str:
    return _output(program, what).rstrip(b"\0").decode(errors="replace").strip()


def _usable_cache(cache: Path | None) -> Path | None:
    try:
        folder = default_cache() if cache is None else cache
        user_cache.make_private(folder)
    except (OSError, RuntimeError) as error:
        _warn(f"compiling without a cache: {error}")
        return None
    return folder


def _load(folder: Path, key: str) -> Compiled | None:
    entry = folder / f"{key}.kernel"
    try:
        content = user_cache.read(entry)
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"compiling again: {error}")
        return None
    checksum, _, body = (content or b"").partition(b"\n")
    found = _parse(body) if content and checksum == _checksum(key, body) else None
    if found is None:
        _warn(f"compiling again: {entry} is damaged or foreign")
    return found


def _parse(body: bytes) -> Compiled | None:
    header, _, cubin = body.partition(b"\n")
    try:
        fields = json.loads(header)
        return Compiled(cubin, fields["name"], Resources(**fields["resources"]), fields["ptx"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # no damage does this: somebody wrote another content with its checksum


def _publish(folder: Path, key: str, compiled: Compiled) -> None:
    fields = asdict(compiled)
    cubin = fields.pop("cubin")
    body = json.dumps(fields).encode() + b"\n" + cubin
    try:
        # Whoever else compiles the same replaces it by the same.
        user_cache.write(folder / f"{key}.kernel", _checksum(key, body) + b"\n" + body)
    except OSError as error:
        # Without the file's name, which is another one for each kernel: one warning.
        _warn(f"compiled kernels are not kept: {folder}: {error.strerror}")


def _checksum(key: str, body: bytes) -> bytes:
    # Over the key too: an entry under another's name is as wrong as a damaged one.
    return hashlib.sha256(key.encode() + body).hexdigest().encode()


@functools.cache
def _warn(message: str) -> None:
    """Warn once per process and message."""
    logger.warning(message)
