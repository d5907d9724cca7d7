"""A short run of the coverage-guided fuzzer, and that it finds what is there to be found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="atheris is not installed")
ROOT = Path(__file__).resolve().parents[1]


def fuzz(script, folder, runs):
    return subprocess.run(
        [sys.executable, script, folder, f"-runs={runs}", "-seed=1"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )


def test_finds_nothing(tmp_path):
    done = fuzz(ROOT / "tests" / "fuzzing.py", tmp_path, 8_000)
    assert done.returncode == 0, done.stderr
    assert "Done 8000 runs" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".kernel") == [
        "corpus",
        "words",
    ]


@pytest.mark.parametrize("documented", ["ConfigError", "knobs.KnobError", "TableError"])
def test_finds_an_error_that_is_not_documented(tmp_path, documented):
    """As if the error were another one than the documented, which is then not expected."""
    source = (ROOT / "tests" / "fuzzing.py").read_text()
    assert f"except {documented}:" in source
    script = tmp_path / "fuzzing.py"
    script.write_text(source.replace(f"except {documented}:", "except OSError:"))
    done = fuzz(script, tmp_path, 8_000)
    assert done.returncode != 0
    assert "Uncaught Python exception" in done.stdout + done.stderr
    assert list(tmp_path.glob("crash-*"))
