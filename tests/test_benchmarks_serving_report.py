"""What is made of the results of servers under load: the table, the bars, the picture."""

from dataclasses import replace

import pytest
from made_up_results import META

from benchmarks import plot, report, schema, serving_table, table
from benchmarks.bars import Verdict
from benchmarks.schema import Result, Row

LOAD = "tp8rank-32l-tp2-in1024-out128-all_at_once"
SERVERS = {"stock": (50_000.0, 4e6), "stock/best": (54_000.0, 3.9e6), "tokenweave": (65_000.0, 3e6)}


def result_of(servers=SERVERS, load=LOAD, **meta):
    rows = [
        Row(
            load,
            1024,
            name,
            6e6,
            1e4,
            {
                "tokens_per_s": tokens_per_s,
                "ttft_us": ttft_us,
                "tpot_us": 12_345.0,
                "requests_per_s": 40.0,
                "goodput_requests_per_s": 17.0,
            },
        )
        for name, (tokens_per_s, ttft_us) in servers.items()
    ]
    return Result("serving", replace(META, **meta), tuple(rows))


def verdicts(result):
    return {
        each.bar.removeprefix(f"{LOAD}: "): each.verdict for each in serving_table.judge(result)
    }


def test_the_table_has_what_each_server_did_over_the_fastest_of_stock():
    lines = table.text(result_of()).splitlines()
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if LOAD in line
    ]
    assert [row[1:] for row in found] == [
        ["stock", "50000", "0.93x", "4000.0", "12.35", "17.00"],
        ["stock/best", "54000", "1.00x", "3900.0", "12.35", "17.00"],
        ["tokenweave", "65000", "1.20x", "3000.0", "12.35", "17.00"],
    ]


def test_a_model_s_throughput_has_a_bar_and_no_latency_may_be_worse():
    assert set(verdicts(result_of()).values()) == {Verdict.PASS}
    slow = verdicts(result_of({**SERVERS, "tokenweave": (64_000.0, 3.97e6)}))
    assert slow == {
        "tokens/s over stock/best": Verdict.FAIL,  # 1.185
        "TTFT over the least of stock's": Verdict.FAIL,  # 1.018
    }


def test_the_bound_is_no_rival(tmp_path):
    result_of({**SERVERS, "no_comm": (90_000.0, 1e6)}).save(tmp_path / "serving.json")
    result = schema.load(tmp_path / "serving.json")
    assert set(verdicts(result).values()) == {Verdict.PASS}
    (line,) = (line for line in table.text(result).splitlines() if "no_comm" in line)
    assert "1.67x" in line


def test_the_latency_that_is_judged_is_shown():
    _, latency = serving_table.judge(result_of())
    assert latency.numbers == "0.769, at most 1.015"  # 3.0 s of 3.9 s


def test_other_loads_may_not_be_slower_than_stock_by_more_than_the_noise():
    for tokens_per_s, verdict in ((53_300.0, Verdict.PASS), (53_100.0, Verdict.FAIL)):
        servers = {**SERVERS, "tokenweave": (tokens_per_s, 3.9e6)}
        for load in ("in512-out128-4_per_s", LOAD.replace("-all", "-chunk1024-all")):
            (judged, _) = serving_table.judge(result_of(servers, load))
            assert judged.verdict is verdict


def test_without_ours_or_on_a_cpu_nothing_is_judged(tmp_path, capsys):
    (missing,) = serving_table.judge(result_of({"stock": SERVERS["stock"]}))
    assert missing.verdict is Verdict.MISSING
    with pytest.raises(ValueError, match="a smoke test's times mean nothing"):
        serving_table.judge(result_of(smoke=True))
    path = tmp_path / "serving.json"
    result_of().save(path)
    assert report.main([str(path), "--check"]) == 0
    assert "2 of 2 passed" in capsys.readouterr().out


def test_one_picture_shows_all_loads(tmp_path):
    rows = [*result_of().rows, *result_of(load="sharegpt_like-8_per_s").rows]
    (drawn,) = plot.plot(Result("serving", META, tuple(rows)), tmp_path / "new", "x")
    assert drawn.name == "x.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")
