"""What users install: sdist, and the wheel built from it, work in clean environments."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from server import environment

from sglang_tokenweave import __version__

ROOT = Path(__file__).resolve().parents[1]
SMOKE = """
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
import torch
import sglang_tokenweave
from sglang_tokenweave import compiler
from sglang_tokenweave.kernels import choose_variant

package = Path(sglang_tokenweave.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert compiler.source_folder() == package / "cuda", compiler.source_folder()
assert version("sglang-tokenweave") == sglang_tokenweave.__version__
(plugin,) = entry_points(group="sglang.srt.plugins", name="tokenweave")
assert plugin.value == "sglang_tokenweave.plugin:register", plugin
variant = choose_variant(torch.bfloat16, 2, 4096)
compiled = compiler.compile_kernel(
    "allreduce_rmsnorm.cu", variant.expression, "sm_90a", cache=Path(sys.argv[1])
)
assert compiled.cubin.startswith(b"\\x7fELF")
print(sglang_tokenweave.__version__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build the sdist, and the wheel from it, with the build tools of this environment."""
    folder = tmp_path_factory.mktemp("dist")
    # No isolation: an isolated build would download its own tools.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def python(
    request: pytest.FixtureRequest,
    built: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the Python of a new environment into which only our package was installed."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, with_pip=False)
    executable = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # torch, SGLang and the compiler from this environment; linked, because what looks for NVIDIA's
    # libraries looks into the environment's own folder and not along sys.path.
    for other in Path(sysconfig.get_path("purelib")).iterdir():
        if "sglang_tokenweave" not in other.name:
            (site / other.name).symlink_to(other)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", executable, "install", "--quiet"),
            *("--no-deps", "--no-build-isolation", "--no-index", built[request.param]),
        ],
        check=True,
        timeout=300,
    )
    return executable


def test_installed_package_imports_and_compiles(python: Path, tmp_path: Path) -> None:
    done = run(python, "-c", SMOKE, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == __version__


def test_installed_command_line(python: Path) -> None:
    done = run(python, "-m", "sglang_tokenweave.launch_server", "--help")
    assert done.returncode == 0, done.stderr
    assert "--tokenweave-min-tokens" in done.stdout


def test_wheel_holds_the_package_and_the_device_sources(built: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    package = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "sglang_tokenweave").rglob("*.py")
    }
    sources = {f"sglang_tokenweave/cuda/{path.name}" for path in (ROOT / "cuda").iterdir()}
    assert package | sources | {"sglang_tokenweave/py.typed"} <= names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sglang_tokenweave"}


def test_sdist_holds_all_that_is_needed_to_work_on_it(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    assert sorted(set(tracked) - names) == []
    assert not [name for name in names if name.startswith((".venv", ".cache", "build"))]


def test_version_has_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", __version__)
    assert f'"{__version__}"' not in (ROOT / "pyproject.toml").read_text()


def test_changelog_is_kept() -> None:
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    for head in heads[1:]:
        released = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", head)
        assert released, f"{head}: expected [VERSION] - YYYY-MM-DD"
        assert _numbers(released[1]) <= _numbers(__version__)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.partition("rc")[0].split(".")))


def test_importing_the_package_imports_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, sglang_tokenweave\n"
        "heavy = {'torch', 'sglang', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_device_sources_do_not_hide_cuda_python() -> None:
    """`cuda/__init__.py` at the root would shadow cuda-python's namespace package."""
    assert not (ROOT / "cuda" / "__init__.py").exists()


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the new environment's Python where this checkout is out of its sight."""
    return subprocess.run(
        [python, *arguments],
        cwd=python.parent,
        env={**environment(2), "PYTHONPATH": "", "PATH": os.defpath},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_the_documents_show_the_deadlines_as_they_are():
    from sglang_tokenweave import deadlines

    rows = re.findall(r"^\| .* \| (\d+)\b.* \|$", section("How long anything waits"), re.M)
    names = ("COLLECTIVE_S", "OP_S", "SHARING_S", "PLAN_S", "DEVICE_S")
    assert [float(row) for row in rows] == [getattr(deadlines, name) for name in names]
    assert {name for name in vars(deadlines) if name.isupper()} == set(names)


def section(title):
    """Return a section of docs/operations.md."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "operations.md").read_text()
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]
