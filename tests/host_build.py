"""Build a kernel's own sources for a CPU: files of tests/host/ take their namesakes' place."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from sglang_tokenweave.compiler import source_folder


def build_host(folder: Path, main: str, variants: Iterable[str], *flags: str) -> str:
    """Compile `main` of tests/host/ in `folder` with these lines as variants.inc."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: install g++ 12 or later, or name one in CXX")
    for source in (*source_folder().glob("*.cu*"), *Path(__file__).with_name("host").iterdir()):
        shutil.copy(source, folder)  # in this order
    (folder / "variants.inc").write_text("".join(variants))
    built = subprocess.run(
        [compiler, "-std=c++20", "-O1", "-pthread", *flags, main, "-o", "host"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return str(folder / "host")
