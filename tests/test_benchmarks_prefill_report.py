"""What is made of the prefill benchmark's results: its tables and bars."""

from dataclasses import replace

import pytest
from made_up_results import META

from benchmarks import plot, prefill_bars, report, table
from benchmarks.bars import Verdict
from benchmarks.schema import Result, Row

SHAPE = "tp8rank-8l-tp2"
TIMES = {  # us, of 1024 tokens; then they grow with the tokens
    "stock/default": 6000.0,
    "stock/raised": 5900.0,
    "fuse": 5700.0,
    "weave/copy": 4500.0,
    "no_comm": 4600.0,
}


def result_of(times=TIMES, shape=SHAPE, cpu_us=300.0, **meta):
    rows = [
        Row(shape, tokens, name, us * tokens / 1024, 90.0, {"cpu_us_per_layer": cpu_us})
        for tokens in (1024, 8192)
        for name, us in times.items()
    ]
    return Result("prefill", replace(META, **meta), tuple(rows))


def judged(result):
    return {(each.bar, each.tokens): each for each in prefill_bars.judge(result)}


def test_the_table_compares_the_best_of_stock_with_the_best_of_ours_and_the_bound():
    text = table.text(result_of())
    assert "### tp8rank-8l-tp2" in text
    assert "| tokens | stock/default ms | stock/raised ms |" in text
    (line,) = (line for line in text.splitlines() if line.startswith("|   1024 |") and "x" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:3] == ["6.00 ±0.04", "5.90 ±0.04"]
    assert cells[-2:] == ["1.31x (weave/copy)", "102"]
    assert text.count("|   1024 |") == 2  # and one line of CPU times


def test_what_the_planner_chose_counts_where_it_took_part():
    text = table.text(result_of({**TIMES, "auto": 5000.0}))
    assert "1.18x (auto)" in text


def test_the_table_says_which_plans_were_chosen():
    shares = {"off_share": 0.25, "fuse_share": 0.0, "weave_share": 0.75}
    result = result_of({**TIMES, "auto": 5000.0})
    rows = [
        replace(row, extra=shares) if (row.variant, row.tokens) == ("auto", 8192) else row
        for row in result.rows
    ]
    text = table.text(replace(result, rows=tuple(rows)))
    assert "1.18x (auto) " in text
    assert "1.18x (auto: off, weave) " in text
    assert "_share" not in text


def test_bars_pass_where_all_is_well():
    found = judged(result_of())
    assert {each.verdict for each in found.values()} == {Verdict.PASS}
    assert (f"{SHAPE}: stock/raised / weave/copy", 1024) in found
    assert (f"{SHAPE}: weave/copy / no_comm", 8192) in found


@pytest.mark.parametrize(
    ("times", "bar"),
    [
        ({"weave/copy": 5000.0}, "stock/raised / weave/copy"),
        ({"no_comm": 4400.0}, "weave/copy / no_comm"),
        ({"auto": 6200.0}, "auto / stock/default"),
    ],
)
def test_each_bar_can_fail(times, bar):
    found = judged(result_of({**TIMES, **times}))
    assert found[f"{SHAPE}: {bar}", 8192].verdict is Verdict.FAIL


def test_cpu_time_has_a_bar_of_its_own():
    result = result_of()
    rows = tuple(
        replace(row, extra={"cpu_us_per_layer": 700.0}) if row.variant == "weave/copy" else row
        for row in result.rows
    )
    found = judged(replace(result, rows=rows))
    assert found[f"{SHAPE}: CPU of weave/copy / stock/raised", 1024].verdict is Verdict.FAIL


def test_without_stock_or_ours_nothing_is_judged():
    found = judged(result_of({"stock/default": 6000.0, "no_comm": 4600.0}))
    assert {each.verdict for each in found.values()} == {Verdict.MISSING}


def test_a_report_judges_prefills_too(tmp_path, capsys):
    path = tmp_path / "prefill.json"
    result_of().save(path)
    assert report.main([str(path), "--check"]) == 0
    assert "5 of 5 passed" in capsys.readouterr().out
    result_of(smoke=True).save(path)
    assert report.main([str(path), "--check"]) == 2
    assert "a smoke test's times mean nothing" in capsys.readouterr().err


def test_a_deeper_model_has_the_same_bars_and_decodes_have_their_own():
    deep = judged(result_of(shape="tp8rank-80l-tp2"))
    assert deep["tp8rank-80l-tp2: stock/raised / weave/copy", 1024].verdict is Verdict.PASS
    times = {"stock/default": 6000.0, "stock/raised": 5900.0, "auto": 6200.0}
    decode = replace(result_of(times), bench="decode")
    bars = {bar for bar, _ in judged(decode)} - {f"{SHAPE}: CPU of auto / stock/raised"}
    assert bars == {f"{SHAPE}: auto / stock/default"}
    assert judged(decode)[f"{SHAPE}: auto / stock/default", 1024].verdict is Verdict.FAIL


@pytest.mark.parametrize("bench", ["prefill", "decode"])
def test_a_picture_is_drawn_of_every_shape(bench, tmp_path):
    rows = [*result_of().rows, *result_of(shape="llama-3-8b-8l-tp2").rows]
    drawn = plot.plot(Result(bench, META, tuple(rows)), tmp_path / "new", "x")
    assert [path.name for path in drawn] == [
        "x-tp8rank-8l-tp2-tokens.png",
        "x-llama-3-8b-8l-tp2-tokens.png",
    ]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_no_picture_is_drawn_of_what_means_nothing(tmp_path):
    with pytest.raises(ValueError, match="no plots of a smoke test"):
        plot.plot(result_of(smoke=True), tmp_path, "x")
