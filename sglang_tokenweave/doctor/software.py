"""Ask the installed software: the compiler library, SGLang, packages and the kernels' cache."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path

from sglang_tokenweave import compiler, preflight
from sglang_tokenweave.config import ConfigError, TokenWeaveConfig
from sglang_tokenweave.doctor.facts import Cache, Nvrtc, Packages, Sglang

PACKAGES = (
    "sglang",
    "torch",
    "flashinfer-python",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-ml-py",
)


def gather_nvrtc() -> Nvrtc:
    """Return what the compiler library says; it needs no GPU.

    Raises:
        ImportError: cuda-python is not installed.
        RuntimeError: the library does not load.
    """
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    _, major, minor = nvrtc.nvrtcVersion()
    _, capabilities = nvrtc.nvrtcGetSupportedArchs()
    return Nvrtc((major, minor), tuple(capabilities))


def gather_sglang() -> Sglang:
    """Import SGLang, register our hooks as its workers do, and see which of them take.

    Raises:
        Exception: whatever a broken SGLang raises when it is imported.
    """
    from sglang_tokenweave import hooks, install, seams

    hook_registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.register(hooks.HOOKS, strict=False)
    hook_registry.HookRegistry.apply_hooks()
    state = install.state
    return Sglang(
        num_hooks=len(hooks.HOOKS),
        missing=(*state.reasons, *seams.find_missing()),
        partial=state.notes,
    )


def gather_packages() -> Packages:
    """Return versions without importing any of the packages."""
    return Packages(
        python=sys.version_info[:2],
        versions={name: _version(name) for name in PACKAGES},
        torch_cuda=_torch_cuda(),
        plugin_problem=preflight.plugin_problem(),
        config_problem=_config_problem(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    # To import torch takes seconds; the file is generated and only assigns.
    with suppress(OSError):
        text = Path(spec.origin).with_name("version.py").read_text(errors="replace")
        found = re.search(r"^cuda\b.*?= *['\"]([\d.]+)", text, re.MULTILINE)
        return found[1] if found else None
    return None


def _config_problem() -> str | None:
    try:
        TokenWeaveConfig.from_environment()
    except ConfigError as error:
        return str(error)
    return None


def gather_cache(in_container: bool) -> Cache:
    """Look at the cache without creating it."""
    try:
        folder = compiler.default_cache()
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        status = nearest.stat()
        kernels = [path.stat().st_size for path in folder.glob("*.kernel")]
        free = shutil.disk_usage(nearest).free
        in_own_layer = in_container and status.st_dev == Path("/").stat().st_dev
    except (OSError, RuntimeError) as error:
        return Cache(folder="", problem=str(error))
    problem = None
    if nearest == folder and status.st_uid != os.geteuid():
        problem = f"it belongs to uid {status.st_uid}, not {os.geteuid()}"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        problem = f"uid {os.geteuid()} cannot write to {nearest}"
    return Cache(
        folder=str(folder),
        problem=problem,
        mode=stat.S_IMODE(status.st_mode) if nearest == folder else 0o700,
        num_kernels=len(kernels),
        num_bytes=sum(kernels),
        free_bytes=free,
        is_volatile=in_own_layer,
    )
