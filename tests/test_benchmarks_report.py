"""What is made of results: tables, plots, bars; on made-up rows."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_results import META, result_of, rows_of

from benchmarks import bars, plot, report, table
from benchmarks.bars import Verdict
from benchmarks.schema import Result

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_compares_with_the_best_rival_and_the_floor():
    text = table.text(result_of(absent={"sglang_v2+norm": "not installed"}))
    assert "2 ranks, NVIDIA H200, driver 580.65, commit 0123456789ab" in text
    row = next(line for line in text.splitlines() if line.startswith("|   1024 |"))
    # two_shot is faster than flashinfer, but norms nothing: it is no rival.
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "1024", "49.7", "70.6 ±0.7 (flashinfer)", "52.1 ±0.5 (fused/32)", "1.35x", "95",
    ]  # fmt: skip
    assert "- sglang_v2+norm: not installed" in text
    assert "commit 0123456789ab-dirty\n" in table.text(result_of(commit=META.commit + "-dirty"))


def test_a_table_has_dashes_where_nothing_was_measured():
    text = table.text(Result("op", META, tuple(rows_of(64)[:3])))
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == ["64", "3.10", "28.7 ±0.3 (nccl+norm)", "-", "-", "-"]


def test_bars_pass_fail_and_are_missing():
    judged = bars.judge(result_of())
    assert {each.verdict for each in judged} == {Verdict.PASS}
    assert {each.bar for each in judged} == {bar.text for bar in bars.BARS}

    slow = [
        replace(row, time_us=3.2 * row.time_us)
        if row.variant == "fused/4" and row.tokens == 4096
        else row
        for row in result_of().rows
        if row.variant != "copy_engine"
    ]
    judged = bars.judge(Result("op", META, tuple(slow)))
    failed = [(each.bar, each.tokens) for each in judged if each.verdict is Verdict.FAIL]
    assert failed == [("4 CTAs, of the floor", 4096)]
    missing = {each.bar for each in judged if each.verdict is Verdict.MISSING}
    assert missing == {"copy engines, of the floor"}


@pytest.mark.parametrize(
    ("variant", "tokens", "factor", "bar"),
    [
        ("fused/16", 1024, 1.06, "16 CTAs, of the floor"),
        ("fused/8", 8192, 1.07, "8 CTAs, of the floor"),
        ("fused/32", 256, 1.35, "256 tokens"),
        ("copy_engine", 2048, 1.2, "copy engines, of the floor"),
        ("flashinfer", 8, 0.5, "small batches, of the fastest rival"),
        ("nccl+norm", 512, 0.4, "medium batches, of the fastest rival"),
        ("two_shot", 32768, 0.97, "up to 32 CTAs, of two-shot without norm"),
    ],
)
def test_each_bar_can_fail(variant, tokens, factor, bar):
    rows = [
        replace(row, time_us=factor * row.time_us)
        if row.tokens == tokens
        and (row.variant == variant or (bar == "256 tokens" and row.variant.startswith("fused")))
        else row
        for row in result_of().rows
    ]
    judged = bars.judge(Result("op", META, tuple(rows)))
    assert bar in {each.bar for each in judged if each.verdict is Verdict.FAIL}


def test_nothing_is_concluded_from_a_smoke_test(tmp_path, capsys):
    path = tmp_path / "op.json"
    result_of(smoke=True).save(path)
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("SMOKE TEST")
    assert "speed-up" not in text
    for option in (["--check"], ["--plots", str(tmp_path / "plots")]):
        assert report.main([str(path), *option]) == 2
        assert "smoke test" in capsys.readouterr().err


def test_a_report_is_made_again_from_a_file_alone(tmp_path):
    path = tmp_path / "op.json"
    result_of().save(path)
    command = [sys.executable, "-m", "benchmarks.report", str(path), "--check"]
    command += ["--plots", str(tmp_path / "plots")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [each.name for each in pictures] == [
        "op-h8192-bf16-ctas.png",
        "op-h8192-bf16-tokens.png",
    ]
    for each in pictures:
        assert each.read_bytes().startswith(b"\x89PNG")
        assert each.stat().st_size > 20_000  # not an empty frame


def test_a_report_of_a_bad_file_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "op.json").write_text('{"bench": "op"}')
    assert report.main([str(tmp_path / "op.json")]) == 2
    assert "op.json.rows: expected list, got nothing" in capsys.readouterr().err


def test_a_plot_needs_two_cta_counts(tmp_path):
    rows = tuple(
        row for row in result_of().rows if row.variant in ("floor", "fused/8", "nccl+norm")
    )
    paths = plot.plot(Result("op", META, rows), tmp_path, "x")
    assert [path.name for path in paths] == ["x-h8192-bf16-tokens.png"]
