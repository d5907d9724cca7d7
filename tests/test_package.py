"""What users install: the wheel carries the kernels' sources and SGLang finds the plugin."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # The build tools of this environment: an isolated build would download its own.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_the_device_sources(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        f"sglang_tokenweave/{path.name}" for path in (ROOT / "sglang_tokenweave").glob("*.py")
    }
    sources = {f"sglang_tokenweave/cuda/{path.name}" for path in (ROOT / "cuda").iterdir()}
    assert package | sources | {"sglang_tokenweave/py.typed"} <= names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sglang_tokenweave"}


def test_wheel_registers_the_plugin_with_sglang(wheel, tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            tmp_path,
            wheel,
        ],
        check=True,
        timeout=300,
    )
    code = (
        "from importlib.metadata import distributions\n"
        f"(ours,) = distributions(name='sglang-tokenweave', path=[{str(tmp_path)!r}])\n"
        "print([(e.group, e.name, e.value) for e in ours.entry_points])\n"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed.strip() == str(
        [("sglang.srt.plugins", "tokenweave", "sglang_tokenweave.plugin:register")]
    )


def test_importing_the_package_imports_neither_torch_nor_sglang():
    code = (
        "import sys, sglang_tokenweave\n"
        "heavy = {'torch', 'sglang', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_device_sources_do_not_hide_cuda_python():
    """`cuda/__init__.py` at the root would shadow cuda-python's namespace package."""
    assert not (ROOT / "cuda" / "__init__.py").exists()
