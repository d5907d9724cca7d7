"""Check an image while it is built, as the user who will serve: `check.py cpu|cuda`.

What an image lacks is found when it is built, not when it serves.
"""

import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

import torch
from packaging.requirements import Requirement

from sglang_tokenweave.compiler import compile_kernel
from sglang_tokenweave.kernels import choose_variant
from sglang_tokenweave.preflight import check_plugin


def main(device: str) -> None:
    """Check; print what was found.

    Raises:
        SystemExit: naming what is missing.
    """
    if os.getuid() == 0:
        raise SystemExit(
            "check.py runs as root: it stands after USER, so that it sees what USER may"
        )
    check_plugin()
    _check_sglang()
    if device == "cuda":
        _check_kernels()
    if model := os.environ.get("MODEL"):
        _check_readable(Path(model))
    print(
        f"checked for {device}: SGLang {importlib.metadata.version('sglang')}, torch",
        torch.__version__,
    )


def _check_sglang() -> None:
    """Refuse a base image whose SGLang we do not support: our own requirement names the range."""
    requirements = map(Requirement, importlib.metadata.requires("sglang-tokenweave") or [])
    (supported,) = (each.specifier for each in requirements if each.name == "sglang")
    found = importlib.metadata.version("sglang")
    if not supported.contains(found, prereleases=True):
        raise SystemExit(f"the base image has SGLang {found}; supported: {supported}")


def _check_kernels() -> None:
    variant = choose_variant(torch.bfloat16, 2, 4096)
    with tempfile.TemporaryDirectory() as cache:
        compile_kernel("allreduce_rmsnorm.cu", variant.expression, "sm_90a", cache=Path(cache))


def _check_readable(folder: Path) -> None:
    closed = [str(path) for path in folder.rglob("*") if not os.access(path, os.R_OK)]
    if closed:
        raise SystemExit(f"user {os.getuid()} cannot read {', '.join(closed)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
