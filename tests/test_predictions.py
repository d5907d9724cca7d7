"""The analytic model, what it is held against, and what the page says of it."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import checks, model, predict, published
from benchmarks.checks import Check
from benchmarks.model import B200, H100, H200, LLAMA_70B, MIXTRAL, Setting

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "predictions.md").read_text()

microseconds = st.integers(0, 50).map(float)
blocks = st.lists(
    st.tuples(st.tuples(microseconds, microseconds), st.tuples(microseconds, microseconds)),
    min_size=1,
    max_size=8,
)


def longest_path(computes, sums):
    """The end of the last task, from what each waits for, one by one."""
    ends = {}
    previous = {"compute": None, "sum": None}
    for index in range(len(computes)):
        for half in (0, 1):
            waits = [previous["compute"], ("sum", index - 1, half)]
            start = max((ends[each] for each in waits if each in ends), default=0.0)
            ends["compute", index, half] = start + computes[index][half]
            previous["compute"] = ("compute", index, half)
            waits = [previous["sum"], previous["compute"]]
            start = max(ends[each] for each in waits if each in ends)
            ends["sum", index, half] = start + sums[index][half]
            previous["sum"] = ("sum", index, half)
    return max(ends.values())


@given(blocks)
def test_a_woven_pass_takes_as_long_as_its_longest_chain(drawn):
    computes, sums = (tuple(each[i] for each in drawn) for i in (0, 1))
    assert model.schedule_us(computes, sums) == longest_path(computes, sums)


def test_sums_that_are_shorter_than_the_computation_are_all_hidden_but_the_last():
    computes, sums = ((10.0, 10.0),) * 6, ((9.0, 9.0),) * 6
    assert model.schedule_us(computes, sums) == 6 * 20 + 9
    sums = ((12.0, 12.0),) * 6  # longer: each computation waits for the sum before
    assert model.schedule_us(computes, sums) == 10 + 12 * 12


@pytest.mark.parametrize(
    ("ranks", "unicast", "multicast"), [(2, 1.0, 1.5), (4, 1.5, 1.25), (8, 1.75, 1.125)]
)
def test_bytes_over_the_link(ranks, unicast, multicast):
    assert model.link_bytes(1.0, ranks, multicast=False) == unicast
    assert model.link_bytes(1.0, ranks, multicast=True) == multicast


def test_the_kernels_constants_give_back_the_rows_they_are_from():
    rows = {(r.tokens, r.variant): r.time_us for r in model.load(model.OP).rows}
    setting = Setting(LLAMA_70B, H200, 2, multicast=False)
    assert model.fused_us(setting, 8192, 4) == pytest.approx(rows[8192, "fused/4"])
    # Rounded to whole GB/s; the only row has a few bytes, too.
    assert model.fused_us(setting, 8192, 16) == pytest.approx(rows[8192, "fused/16"], rel=2e-3)
    assert model.fused_us(setting, 1, 32) == pytest.approx(rows[1, "fused/32"], rel=1e-2)


@pytest.mark.parametrize("multicast", [False, True])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_times_are_in_order(ranks, multicast):
    for tokens in (1024, 4096, 16384):
        times = model.layer_times(Setting(LLAMA_70B, H200, ranks, multicast), tokens)
        assert times.no_comm < times.stock
        assert times.fuse < times.stock
        assert times.ctas in model.CTAS_BESIDE
        faster = model.layer_times(Setting(LLAMA_70B, B200, ranks, multicast), tokens)
        assert faster.stock < times.stock


def test_attention_of_two_halves_is_that_of_the_whole():
    # The second half attends to the first one's tokens, too.
    def quadratic(first, last):
        long = model.blocks_us(Setting(LLAMA_70B, H100, 8, True), first, last)[0]
        short = model.blocks_us(Setting(LLAMA_70B, H100, 8, True), 0, last - first)[0]
        return long - short

    gained = quadratic(32768, 65536)
    operations = 4 * 1024 * (65536**2 - 2 * 32768**2) / 2
    assert gained == pytest.approx(operations / 616 / 1e6)


def test_errors_are_summarised_by_quantity():
    found = checks.errors(
        [Check("a", "1", 90, 100), Check("b", "1", 3, 2), Check("a", "2", 130, 100)]
    )
    assert [(each.what, each.points) for each in found] == [("a", 2), ("b", 1)]
    assert found[0].median == pytest.approx(0.2)
    assert found[0].bias == pytest.approx(0.1)
    assert found[0].worst.where == "2"


def test_published_figures_are_whole():
    for rows in published.PREFILL_MS.values():
        assert len(rows) == len(published.TOKENS)
        for row in rows:
            assert 0 < row.no_comm < row.stock
    # As the paper's abstract and its artefact say of them.
    llama = published.PREFILL_MS["Llama-3.3-70B", 8][published.TOKENS.index(8192)]
    assert llama.stock / llama.weave == pytest.approx(1.273, abs=0.002)
    mixtral = published.PREFILL_MS["Mixtral-8x22B", 8][0]
    assert mixtral.stock / mixtral.weave == pytest.approx(0.621, abs=0.002)


# --- what the page says in its own words


def points(what):
    return [check for check in checks.prefill() if check.what == what]


def test_the_page_states_the_errors_that_there_are():
    own = {each.what: each for each in checks.errors(checks.own())}
    medians = {what: f"{100 * each.median:.0f} %" for what, each in own.items()}
    few = [medians[f"our kernel at TP={ranks}, up to 8 blocks"] for ranks in (2, 4)]
    words = "one GEMM within {} (median), our kernel within {} on up to 8 blocks of two GPUs and {}"
    assert words.format(medians["one GEMM, H200"], *few) in PAGE
    many = [medians[f"our kernel at TP={ranks}, 16 and 32 blocks"] for ranks in (2, 4)]
    assert "the limit, within {} on two GPUs and {} on four".format(*many) in PAGE

    def spans(words, experts=""):
        found = [own[f"prefill, {what}{experts}"] for what in ("no-comm", "stock", "weave")]
        medians = [round(100 * each.median) for each in found]
        worst = max(abs(each.worst.error) for each in found)
        return words.format(min(medians), max(medians), round(100 * worst))

    assert spans("the times within {} to {} % (median, {} % at worst)") in PAGE
    assert spans("no time ({} to {} % too fast)", ", experts") in PAGE
    for experts, words in (
        ("", "within {} % (median, {} % at worst)"),
        (", experts", "It says {} % too much"),
    ):
        ratio = own[f"prefill, stock / weave{experts}"]
        numbers = round(100 * ratio.median), round(100 * abs(ratio.worst.error))
        assert words.format(*numbers) in PAGE
    assert own["prefill, stock / weave, experts"].bias > 0  # "too much"
    prefills = [own[f"prefill, {what}"] for what in ("no-comm", "stock", "weave", "stock / weave")]
    assert max(each.median for each in prefills) <= 0.05  # what the model is to reach
    outside = [f"{checks.outside_us()[what] / 1000:.1f} ms" for what in ("stock", "weave")]
    assert "{} in stock and {} when woven".format(*outside) in PAGE

    dense = [e for e in checks.errors(checks.prefill()) if "dense" in e.what and "/" not in e.what]
    assert all(each.bias == -each.median for each in dense)  # "always in the same direction"
    ends = [round(100 * f(e.median for e in dense)) for f in (min, max)]
    assert f"it is {ends[0]} to {ends[1]} % too fast" in PAGE

    tp8, tp4 = points("stock / weave, TP=8, dense"), points("stock / weave, TP=4, dense")
    spans = [
        [f(getattr(check, name) for check in tp8) for f in (min, max)]
        for name in ("measured", "predicted")
    ]
    stated = re.search(
        r"TP=8 was ([\d.]+) to ([\d.]+)x it says ([\d.]+) to ([\d.]+)x "
        r"\(median (\d+) % too much; at TP=4 (\d+) %\)",
        PAGE,
    )
    medians = [statistics.median(check.error for check in each) for each in (tp8, tp4)]
    expected = [f"{value:.2f}" for span in spans for value in span]
    expected += [f"{100 * value:.0f}" for value in medians]
    assert list(stated.groups()) == expected

    mixtral = next(c for c in points("stock / weave, TP=8, experts") if " 2048 " in c.where)
    assert mixtral.measured < 1 < mixtral.predicted


def test_the_page_states_the_constants_that_there_are():
    assert f"{model.latency_us():.1f} us, and the slower" in PAGE
    assert f"({model.sm_gb_s():.0f} GB/s in and out)" in PAGE
    rows = {(r.tokens, r.variant): r for r in checks.load(RESULTS / "op-h200x2.json").rows}
    tokens, variant = model.LINK
    moved = model.link_bytes(tokens * 8192 * 2, 2, multicast=False)
    reached = moved / (rows[tokens, variant].time_us - model.latency_us()) / 1e3
    assert pytest.approx(reached, abs=0.5) == H200.unicast_gb_s
    assert f"{H200.unicast_gb_s} GB/s that [our kernel]" in PAGE


def test_predictions_say_that_they_are():
    assert '**Nothing on this\npage but the columns named "measured" was measured.**' in PAGE
    assert "microseconds a layer, on paper" in PAGE


# --- the command


def test_command_prints_and_writes_everything(tmp_path, capsys):
    numbers, picture = tmp_path / "n.json", tmp_path / "p.svg"
    assert predict.main(["--json", str(numbers), "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "NVL72, TP=16, multicast" in said
    written = json.loads(numbers.read_text())
    assert len(written["predictions_us_per_layer"]) == 7 * 2 * 3
    assert len(written["checks"]) == 35 * 5 + 8 * 3 + 5 + 60 + 57 + 45 + 27 * 4
    assert "<svg" in picture.read_text()


def test_command_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys; from benchmarks.predict import main; main([]); "
        "sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_mixtures_of_experts_have_their_own_gemms():
    dense, experts = LLAMA_70B.gemms(8), MIXTRAL.gemms(8)
    assert {gemm.experts for gemm in dense} == {1}
    assert [gemm.experts for gemm in experts] == [1, 1, 8, 8]
