"""docs/results.md: what is measured is shown, and what is not is said."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_results import result_of

from benchmarks import table
from benchmarks.plot import plot
from benchmarks.schema import BENCHES, Result, load

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "docs" / "tools" / "results.py"


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("docs_tools_results", TOOL)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_a_result_is_shown_with_its_command_and_its_table(results, tmp_path):
    result = result_of()
    result.save(tmp_path / "op-new.json")
    parts = results.parts(tmp_path)
    assert "### op-new\n\n[op-new.json](../benchmarks/results/op-new.json), by" in parts["measured"]
    assert f"`{result.meta.command}`" in parts["measured"]
    assert table.text(result) in parts["measured"]
    named = [line.split("`")[1] for line in parts["not-measured"].splitlines()]
    assert named == [name for name in BENCHES if name != "op"]


def test_a_smoke_test_measures_nothing(results, tmp_path):
    result_of(smoke=True).save(tmp_path / "op.json")
    parts = results.parts(tmp_path)
    assert table.SMOKE in parts["measured"]
    assert "- `op`: " in parts["not-measured"]


def test_without_results_the_page_says_so(results, tmp_path):
    parts = results.parts(tmp_path)
    assert parts["measured"] == "No result is committed."
    assert len(parts["not-measured"].splitlines()) == len(BENCHES)


def test_every_committed_file_is_on_the_page(results):
    page = (ROOT / "docs" / "results.md").read_text()
    for path in results.FOLDER.glob("*.json"):
        assert f"### {path.stem}\n" in page
        assert load(path).meta.command in page


def test_thread_blocks_are_columns():
    result = load(ROOT / "benchmarks" / "results" / "one_gpu-h200.json")
    lines = table.text(result).splitlines()
    line = next(each for each in lines if "8192 " in each and " fused " in each)
    assert [cell.strip() for cell in line.strip("|").split("|")][1:4] == ["8192", "fused", "2942.5"]
    some = replace(result, rows=tuple(r for r in result.rows if r.variant != "fused/2"))
    assert isinstance(some, Result)
    line = next(
        each for each in table.text(some).splitlines() if " 64 " in each and "fused" in each
    )
    assert line.split("|")[4].strip() == "-"


def test_pictures_are_shown_where_they_were_drawn(results, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "IMAGES", tmp_path)
    result = result_of()
    assert results.pictures_of("op-new", result) == []
    drawn = plot(result, tmp_path, "op-new")
    assert results.pictures_of("op-new", result) == [path.name for path in drawn]
