"""The benchmarks' schema, statistics, plans and command."""

import json
import os
from pathlib import Path

import pytest
import torch
from made_up_results import CTAS, META, result_of, rows_of

from benchmarks import cases, machine, op, prefill, roles, suite, switches, table, timing
from benchmarks.cases import Case
from benchmarks.op import main
from benchmarks.ranks import RankError
from benchmarks.roles import Role
from benchmarks.schema import BENCHES, VERSIONS, Meta, Result, Row, SchemaError, load, parse
from benchmarks.worker import VARIANTS, Report, run_rank

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def data(tmp_path):
    """Return a valid file, decoded."""
    path = tmp_path / "op.json"
    result_of(absent={"sglang_v2+norm": "not installed"}).save(path)
    return json.loads(path.read_text())


def test_a_result_survives_its_file(tmp_path):
    result = result_of(absent={"x": "y"}, clocks="1980 MHz", multicast="A=1")
    result.save(tmp_path / "new" / "op.json")
    assert load(tmp_path / "new" / "op.json") == result
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["op.json"]


@pytest.mark.parametrize(
    ("place", "value", "wanted"),
    [
        (("rows", 3, "time_us"), 0, r"f\.json: rows\[3\]\.time_us: expected more than 0.* got 0"),
        (("rows", 3, "time_us"), "9", r"rows\[3\]\.time_us: expected a number, got '9'"),
        (("rows", 3, "time_us"), float("nan"), r"rows\[3\]\.time_us: .*finite, got nan"),
        (("rows", 3, "spread_us"), -1.0, r"rows\[3\]\.spread_us: expected 0 or more"),
        (("rows", 3, "spread_us"), None, r"rows\[3\]\.spread_us"),
        (("rows", 3, "tokens"), True, r"rows\[3\]\.tokens: expected int, got True"),
        (("rows", 3, "tokens"), 0, r"rows\[3\]\.tokens: expected 1 or more"),
        (("rows", 3, "variant"), "fused", r"rows\[3\]\.variant: .*got 'fused'"),
        (("rows", 3, "ttft_us"), 1.0, r"rows\[3\]\.ttft_us: unknown field"),
        (("rows", 3), [], r"rows\[3\]: expected an object"),
        (("rows",), {}, r"f\.json\.rows: expected list"),
        (("bench",), "ops", r"f\.json\.bench: .*got 'ops'"),
        (("meta", "commit"), "main", r"meta\.commit"),
        (("meta", "date"), "yesterday", r"meta\.date"),
        (("meta", "gpu"), " ", r"meta\.gpu"),
        (("meta", "absent"), {"flashinfer": ""}, r"meta\.absent\.flashinfer"),
        (("meta", "versions", "rust"), "1", r"meta\.versions\.rust: unknown field"),
        (("meta", "smoke"), 1, r"meta\.smoke: expected bool"),
    ],
)
def test_a_wrong_field_is_named(data, place, value, wanted):
    *path, last = place
    inner = data
    for step in path:
        inner = inner[step]
    inner[last] = value
    with pytest.raises(SchemaError, match=wanted):
        parse(data, "f.json")


@pytest.mark.parametrize("name", ["date", "gpu", "driver", "world_size", "versions", "commit"])
def test_meta_is_complete(data, name):
    del data["meta"][name]
    with pytest.raises(SchemaError, match=rf"meta\.{name}: expected .*, got nothing"):
        parse(data, "f.json")


def test_a_repeated_row_is_refused(data):
    data["rows"].append(data["rows"][0])
    with pytest.raises(SchemaError, match=r"repeats .* of rows\[0\]"):
        parse(data, "f.json")


def test_what_would_not_be_read_back_is_not_written(tmp_path):
    wrong = Result("op", META, (Row("h8192-bf16", 1, "mystery", 1.0, 0.0),))
    with pytest.raises(SchemaError, match="mystery"):
        wrong.save(tmp_path / "op.json")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "none.json"):
        with pytest.raises(SchemaError, match=name):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("bench", "variant", "column"),
    [
        ("prefill", "weave/copy_engine", "tokens_per_s"),
        ("prefill", "no_comm", "cut_tokens"),
        ("decode", "fuse/8", "context_tokens"),
        ("serving", "stock/nccl", "goodput_requests_per_s"),
    ],
)
def test_other_benchmarks_have_their_own_variants_and_columns(bench, variant, column):
    row = {"shape": "llama-8b", "tokens": 8, "variant": variant, "time_us": 1, "spread_us": 0}
    data = {"bench": bench, "meta": _meta_data(), "rows": [row | {column: 2.5}]}
    result = parse(data, "f.json")
    assert result.rows[0].extra == {column: 2.5}
    assert "2.5" in table.text(result)
    with pytest.raises(SchemaError, match="variant"):
        parse({**data, "bench": "op", "rows": [row]}, "f.json")


def _meta_data():
    return {name: getattr(META, name) for name in Meta.__dataclass_fields__}


def test_every_variant_of_the_command_is_in_the_schema():
    rows = tuple(Row("h8-bf16", 1, name, 1.0, 0.0) for name in [*VARIANTS, "floor"])
    data = [vars(row) for row in rows]
    for row in data:
        row.pop("extra")
    parsed = parse({"bench": "op", "meta": _meta_data(), "rows": data}, "f.json")
    assert [row.variant for row in parsed.rows] == [*VARIANTS, "floor"]
    assert {name for name in VARIANTS if roles.role(name) is Role.OURS} == {
        "copy_engine",
        "push",
        "push_twice",
        *(f"{transport}/{ctas}" for transport in ("fused", "multicast") for ctas in CTAS),
    }
    assert {"op", "prefill", "decode", "serving"} <= set(BENCHES)


def test_a_round_has_another_order_each_time_and_the_same_on_every_rank():
    names = [str(i) for i in range(12)]
    orders = [timing.round_order(names, index) for index in range(5)]
    assert orders == [timing.round_order(names, index) for index in range(5)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


def test_a_round_is_as_slow_as_its_slowest_rank():
    assert timing.slowest([[1, 5, 3], [2, 4, 3]]) == [2, 5, 3]
    with pytest.raises(ValueError, match=r"different rounds: \[1, 2\]"):
        timing.slowest([[1], [1, 2]])


def test_a_summary_is_median_and_interquartile_range():
    assert timing.summarize([5, 1, 2, 4, 3]) == timing.Summary(3, 2)  # quartiles 2 and 4
    assert timing.summarize([1, 1, 1, 1000]).time_us == 1
    assert timing.summarize([7]) == timing.Summary(7, 0)
    with pytest.raises(ValueError, match="no rounds"):
        timing.summarize([])


def test_measuring_interleaves_and_stops_in_time():
    log = []
    samples = {name: lambda name=name: log.append(name) or 1.0 for name in "ab"}
    left = iter([True, True, False])
    times = timing.measure(
        samples, 9, lambda name, index: log.append((name, index)), lambda: next(left)
    )
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert log[::2] == [(name, i) for i in range(3) for name in timing.round_order("ab", i)]
    assert log[1::2] == [name for name, _ in log[::2]]


def test_the_floor_is_what_must_cross_the_link():
    case = Case(8192, "bf16", 1024)
    assert case.shape == "h8192-bf16"
    assert case.bytes == 2**24
    assert cases.floor_bytes(case, 2) == 2**24
    assert cases.floor_bytes(case, 4) == 1.5 * 2**24
    assert cases.floor_us(case, 2, 337) == pytest.approx(49.8, abs=0.05)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("tokens", cases.TOKENS)
def test_calls_fall_evenly_on_buffers_that_exceed_the_cache_and_do_not_overflow(tokens, world_size):
    case = Case(8192, "bf16", tokens)
    buffers = cases.num_buffers(case, 50 * 2**20)
    calls = cases.num_calls(case, world_size, buffers, smoke=False)
    assert calls % buffers == 0
    assert buffers == 8 or 2 * case.bytes * buffers >= 2 * 50 * 2**20
    assert world_size ** (calls // buffers * (cases.REPLAYS + 1)) < 2.0**123  # of bf16's 2**127


def test_a_plan_spends_the_time_and_no_more():
    grid = cases.grid([4096, 8192], "bf16", cases.TOKENS)
    options = {"cache_bytes": 50 * 2**20, "start_s": 60}
    plans = [cases.plan(grid, 17, 2, seconds, **options) for seconds in (130, 200, 10_000)]
    assert plans[0].seconds <= 130
    assert plans[1].seconds <= 200
    assert cases.MIN_ROUNDS <= plans[0].rounds < plans[1].rounds < plans[2].rounds == 41
    with pytest.raises(ValueError, match=r"61 s are too few: 32 sizes .* give more --seconds"):
        cases.plan(grid, 17, 2, 61, **options)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (([8191], "bf16", [1]), "hidden 8191"),
        (([8192], "fp8", [1]), "dtype fp8"),
        (([8192], "bf16", [0]), "tokens 0"),
    ],
)
def test_a_grid_names_what_it_cannot_hold(arguments, wanted):
    with pytest.raises(ValueError, match=wanted):
        cases.grid(*arguments)


def test_one_switch_forbids_multicast_to_every_library():
    environment = {"NCCL_NVLS_ENABLE": "0"}
    with pytest.raises(switches.MulticastForbiddenError, match="would not know"):
        switches.check("torch", False, environment)
    switches.spread(environment)
    assert environment == switches.SWITCHES
    switches.check("torch", False, environment)
    with pytest.raises(switches.MulticastForbiddenError, match="multimem uses NVLink multicast"):
        switches.check("multimem", True, environment)


@pytest.mark.parametrize("environment", [{}, {"NCCL_NVLS_ENABLE": "1"}])
def test_without_a_switch_multicast_is_allowed(environment):
    before = dict(environment)
    switches.spread(environment)
    assert environment == before
    switches.check("multimem", True, environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_command_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["--tokens", "1"]) == 2
    assert "needs NVIDIA GPUs" in capsys.readouterr().err


def test_versions_are_complete_and_the_commit_is_the_trees(tmp_path):
    assert set(machine.versions()) == set(VERSIONS)
    assert all(machine.versions().values())
    with pytest.raises(RuntimeError, match="--commit"):
        machine.git_commit(tmp_path)


@pytest.fixture
def machine_of_two(monkeypatch):
    """Pretend to a machine with two GPUs, up to where a rank's process begins."""

    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(machine, "_nvidia_smi", lambda *_: ["580.65", "1980 MHz", "700 W"])


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--hidden", "8191"], "hidden 8191"),
        (["--tokens", "1,x"], "'1,x'"),
        (["--variants", "fused/3"], "variant 'fused/3': allowed are nccl"),
        (["--world-size", "3"], "3 ranks on 2 GPUs"),
        (["--seconds", "1"], "too few"),
    ],
)
def test_wrong_arguments_are_named(arguments, wanted, capsys, machine_of_two):
    assert main(arguments) == 2
    assert wanted in capsys.readouterr().err


def _reports(end):
    """Stand in for the ranks: two sizes, then an end of some kind."""

    def run(function, world_size, options, *, deadline_s):
        assert (function, world_size, deadline_s) == (run_rank, 2, 77)
        assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
        yield 0, Report(absent={"flashinfer at h8192-bf16": "not installed"})
        for case in options.cases:
            yield 0, Report(tuple(rows_of(case.tokens)))
        yield from end()

    return run


def _fail():
    yield 0, Report(absent={"fused/4 at h8192-bf16, 2 tokens": "wrong result: 1.0"})
    raise RankError("rank 1 died in 'timing'\nmore")


def _find_wrong():
    yield 0, Report(absent={"fused/4 at h8192-bf16, 2 tokens": "wrong result: 1.0"})


@pytest.mark.parametrize("bench", [op, prefill, suite])
def test_a_commit_that_results_could_not_state_is_refused_before_anything_runs(bench, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--commit", "main"])
    assert ended.value.code == 2
    assert "'main': expected 7 to 40 digits of a commit's hash" in capsys.readouterr().err


def test_ranks_end_when_what_they_report_cannot_be_kept(tmp_path, machine_of_two, monkeypatch):
    ended = []

    def reports(*_, **__):
        try:
            yield 0, Report(tuple(rows_of(1)), {})
        finally:
            ended.append(True)

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(op, "run_ranks", reports)
    monkeypatch.setattr(Result, "save", fail)
    with pytest.raises(OSError, match="disk") as raised:
        main(["--tokens", "2", "--hidden", "8192", "--commit", "abcdef0", "--seconds", "30"])
    assert ended, f"they ran on, held by the traceback of {raised.value}"


@pytest.mark.parametrize(
    ("end", "code", "absent"),
    [
        (list, 0, {}),
        (_find_wrong, 1, {"fused/4 at h8192-bf16, 2 tokens": "wrong result: 1.0"}),
        (
            _fail,
            1,
            {
                "fused/4 at h8192-bf16, 2 tokens": "wrong result: 1.0",
                "run": "ended early: rank 1 died in 'timing'",
            },
        ),
    ],
)
def test_nothing_that_was_measured_is_lost(
    end, code, absent, tmp_path, capsys, machine_of_two, monkeypatch
):
    monkeypatch.setattr(op, "run_ranks", _reports(end))
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    path = tmp_path / "op.json"
    arguments = ["--tokens", "2,1", "--hidden", "8192", "--deadline", "77", "--commit", "abcdef0"]
    assert main([*arguments, "--output", str(path)]) == code
    result = load(path)
    assert result.rows == (*rows_of(1), *rows_of(2))
    assert result.meta.absent == {"flashinfer at h8192-bf16": "not installed", **absent}
    assert result.meta.world_size == 2
    assert result.meta.multicast == "NCCL_NVLS_ENABLE=0"
    assert "--tokens 2,1" in result.meta.command
    printed = capsys.readouterr()
    assert "rounds: about" in printed.out
    assert "absent: flashinfer at h8192-bf16: not installed" in printed.out
    assert ("error: rank 1 died" in printed.err) == (end is _fail)
