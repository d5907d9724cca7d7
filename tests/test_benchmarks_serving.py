"""The benchmark of whole servers: its loads, its order, its errors."""

import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from thorough import rare
from transformers import AutoTokenizer

from benchmarks import client, load, schema, servers, serving, shapes
from benchmarks.forward_timer import NAME, SETTINGS, Settings
from benchmarks.load import LoadError, Outcome, Target
from benchmarks.servers import UNBALANCED, Contender, ServerError
from launch import demo

RECORD = {
    "completed": 3,
    "duration": 2.0,
    "errors": ["", "", ""],
    "ttfts": [0.1, 0.9, 0.2],
    "itls": [[0.01] * 3, [0.01] * 3, [0.2, 0.2]],
    "output_lens": [4, 4, 3],
    "total_input_tokens": 300,
    "median_e2e_latency_ms": 250.0,
    "median_ttft_ms": 200.0,
    "median_tpot_ms": 10.0,
    "request_throughput": 1.5,
    "total_throughput": 155.0,
}
TARGET = Target(ttft_ms=500, tpot_ms=50)


# --- loads


def test_lengths_have_the_published_means_where_they_are_not_cut():
    drawn = load.lengths(20_000, seed=1)
    assert drawn == load.lengths(20_000, seed=1) != load.lengths(20_000, seed=2)
    for index, mean in enumerate(load.SHAREGPT_MEANS):
        found = [each[index] for each in drawn]
        assert min(found) >= 4
        assert max(found) <= 1024
        cut_at_1024 = mean * (1 - math.exp(-1024 / mean))
        # 20,000 draws: the mean is known to 1 %, three times that is allowed.
        assert statistics.mean(found) == pytest.approx(cut_at_1024, rel=0.03)


def test_conversations_are_as_long_as_drawn_and_all_different(tmp_path):
    path = tmp_path / "c.jsonl"
    load.write_conversations(path, [(5, 4), (7, 9), (5, 4)])
    turns = [
        [turn["value"] for turn in json.loads(line)["conversations"]]
        for line in path.read_text().splitlines()
    ]
    assert [[len(turn.split()) for turn in each] for each in turns] == [[5, 4], [7, 9], [5, 4]]
    assert len({prompt.split()[0] for prompt, _ in turns}) == 3


def test_fixed_lengths_are_exact_and_others_come_from_a_file(tmp_path):
    fixed = load.client_arguments("in2048-out128", 7, tmp_path, 1)
    assert fixed[fixed.index("--random-input-len") + 1] == "2048"
    assert fixed[fixed.index("--random-range-ratio") + 1] == "1"
    assert "--tokenize-prompt" in fixed
    drawn = load.client_arguments(load.SHAREGPT, 7, tmp_path, 1)
    assert len(Path(drawn[drawn.index("--dataset-path") + 1]).read_text().splitlines()) == 7
    with pytest.raises(ValueError, match="workload 'chat': known are in512-out128, "):
        load.client_arguments("chat", 7, tmp_path, 1)


def test_goodput_counts_requests_that_keep_both_targets():
    found = load.outcome(RECORD, 3, TARGET)
    assert found == Outcome(100, 250e3, 200e3, 10e3, 1.5, 155.0, goodput_requests_per_s=0.5)
    slow = Target(ttft_ms=1000, tpot_ms=1000)
    assert load.outcome(RECORD, 3, slow).goodput_requests_per_s == 1.5


def test_failed_requests_are_not_dropped_in_silence():
    failed = {**RECORD, "completed": 2, "errors": ["", "Traceback\nboom", ""]}
    with pytest.raises(LoadError, match=r"(?s)2 of 3 requests were answered; the first: .*boom"):
        load.outcome(failed, 3, TARGET)
    with pytest.raises(LoadError, match="3 of 4 requests were answered"):
        load.outcome(RECORD, 4, TARGET)


def test_rounds_are_summed_up_by_medians():
    one = load.outcome(RECORD, 3, TARGET)
    rounds = [replace(one, latency_us=value, tokens_per_s=value) for value in (1.0, 5.0, 2.0)]
    assert load.middle(rounds) == replace(one, latency_us=2.0, tokens_per_s=2.0)


# --- servers


PLUGIN = Path("plugin")


def contenders(*extra, model=("--model", "m")):
    return serving.contenders(serving.parser().parse_args([*model, *extra]), PLUGIN)


def test_a_stock_server_is_as_if_the_extension_were_not_installed():
    stock, best, ours = contenders(
        "--both", "--a 1", "--stock-best", "--b 2", "--ours=--tokenweave-transport peer"
    )
    assert [each.variant for each in (stock, best, ours)] == ["stock", "stock/best", "tokenweave"]
    assert stock.environment(2, on_cpu=False)["SGLANG_PLUGINS"] == "none"
    command = best.command("m", 4, 20000, on_cpu=False)
    assert command[1:3] == ["-m", "sglang.launch_server"]
    assert command[-6:] == ["--tp", "4", "--a", "1", "--b", "2"]
    assert "SGLANG_PLUGINS" not in ours.environment(2, on_cpu=False)
    command = ours.command("m", 2, 20000, on_cpu=True)
    assert command[1:3] == ["-m", "sglang_tokenweave.launch_server"]
    assert command[-4:] == ["--a", "1", "--tokenweave-transport", "peer"]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (("--model", "m"), [None, None, Settings(no_communication=True, draws_weights=False)]),
        (("--shape", "smoke"), [Settings(), Settings(), Settings(no_communication=True)]),
    ],
)
def test_weights_are_drawn_for_every_server_of_a_shape_and_sums_left_out_of_one(model, settings):
    """The dummies of SGLang are so small that GEMMs take less power than real ones."""
    found = contenders("--no-comm", model=model)
    assert [each.variant for each in found] == ["stock", "tokenweave", "no_comm"]
    assert [each.weaves for each in found] == [False, True, False]
    for each, expected in zip(found, settings, strict=True):
        variables = each.environment(2, on_cpu=False)
        if expected is None:
            assert SETTINGS not in variables
            continue
        assert Settings(**json.loads(variables[SETTINGS])) == expected
        assert variables["PYTHONPATH"].split(os.pathsep)[0] == "plugin"
        plugins = ["tokenweave"] if each.weaves else []
        assert variables["SGLANG_PLUGINS"].split(",") == [*plugins, NAME]


def test_servers_that_start_side_by_side_may_find_less_memory_on_one_gpu():
    together = contenders("--together")
    assert all(each.environment(2, on_cpu=False)[UNBALANCED[0]] == "0" for each in together)
    assert not any(UNBALANCED[0] in dict(each.variables) for each in contenders())


def test_sglang_knows_the_switch_that_says_so():
    """Asked in a process of its own, for SGLang reads its variables when it is imported."""
    code = f"from sglang.srt.environ import envs; print(envs.{UNBALANCED[0]}.get())"
    for variables, said in [({}, "True"), (dict([UNBALANCED]), "False")]:
        command = [sys.executable, "-c", code]
        environment = os.environ | variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.split()[-1] == said, done.stderr


def test_a_server_that_does_not_weave_is_not_compared_with_stock(monkeypatch, tmp_path):
    log = tmp_path / "log"
    log.write_text("one\nTokenWeave is NOT active")
    answer = {"internal_states": [{"tokenweave": {"active": False}}]}
    monkeypatch.setattr(demo, "get_json", lambda url: answer)
    with pytest.raises(ServerError, match=r"(?s)TokenWeave is not active.*is NOT active"):
        servers._check(Contender("tokenweave", weaves=True), 1, log)
    servers._check(Contender("stock", weaves=False), 1, log)


def test_servers_take_turns_and_what_was_measured_is_kept(monkeypatch, tmp_path, capsys):
    started, output = [], tmp_path / "serving.json"

    @contextmanager
    def running(contender, *_, **__):
        started.append(contender.variant)
        if len(started) > 4:
            raise ServerError("no GPU left")
        yield 1

    outcome = load.outcome(RECORD, 3, TARGET)
    monkeypatch.setattr(serving, "running", running)
    monkeypatch.setattr(client, "check", lambda folder: None)
    monkeypatch.setattr(serving, "_batches", lambda port: {})
    monkeypatch.setattr(serving, "_drive", lambda *_: outcome)
    command = ["--model", "m", "--cpu", "--commit", "0123456", "--output", str(output)]
    assert serving.main([*command, "--workloads", "in512-out128", "--rates", "2,inf"]) == 1
    assert started == ["stock", "tokenweave", "tokenweave", "stock", "stock"]
    assert capsys.readouterr().err == "error: no GPU left\n"
    rows = schema.load(output).rows
    shapes = ("in512-out128-2_per_s", "in512-out128-all_at_once")
    expected = {(shape, variant) for shape in shapes for variant in ("stock", "tokenweave")}
    assert {(row.shape, row.variant) for row in rows} == expected
    assert rows[0].extra["goodput_requests_per_s"] == 0.5


def test_servers_that_fit_run_together_and_ours_starts_first(monkeypatch, tmp_path):
    running_now, driven = [], []

    @contextmanager
    def running(contender, model, *_, **__):
        tokenizer = AutoTokenizer.from_pretrained(model)
        assert len(tokenizer) == 1024
        assert len(tokenizer.encode("w12" + 4 * shapes.WORD)) == 5
        assert all(tokenizer.decode([token]) for token in range(1024))  # no token is no text
        running_now.append(contender.variant)
        yield len(running_now)

    def drive(options, model, port, workload, rate, number):
        assert len(running_now) == 2
        driven.append((workload, running_now[port - 1]))
        return load.outcome(RECORD, 3, TARGET)

    monkeypatch.setattr(serving, "running", running)
    monkeypatch.setattr(client, "check", lambda folder: None)
    monkeypatch.setattr(serving, "_batches", lambda port: {})
    monkeypatch.setattr(serving, "_drive", drive)
    output = ["--commit", "0123456", "--output", str(tmp_path / "serving.json")]
    loads = ["--workloads", "in512-out128,in1024-out128", "--rounds", "2"]
    command = ["--shape", "smoke", "--cpu", "--together", *loads, *output]
    assert serving.main(command) == 0
    assert running_now == ["tokenweave", "stock"]  # it may measure
    rows = schema.load(tmp_path / "serving.json").rows
    assert rows[0].shape == "smoke-8l-tp2-in1024-out128-all_at_once"
    assert driven == [
        ("in512-out128", "stock"),
        ("in512-out128", "tokenweave"),
        ("in1024-out128", "stock"),
        ("in1024-out128", "tokenweave"),
        ("in512-out128", "tokenweave"),
        ("in512-out128", "stock"),
        ("in1024-out128", "tokenweave"),
        ("in1024-out128", "stock"),
    ]


def test_servers_start_anew_for_each_size_of_chunks(monkeypatch, tmp_path):
    started = []

    @contextmanager
    def running(contender, *_, **__):
        started.append((contender.variant, contender.flags[-2:]))
        yield 1

    monkeypatch.setattr(serving, "running", running)
    monkeypatch.setattr(client, "check", lambda folder: None)
    monkeypatch.setattr(serving, "_batches", lambda port: {})
    monkeypatch.setattr(serving, "_drive", lambda *_: load.outcome(RECORD, 3, TARGET))
    output = ["--commit", "0123456", "--output", str(tmp_path / "serving.json")]
    chunks = ["--workloads", "in512-out128", "--chunk-sizes", "1024,8192", "--rounds", "1"]
    assert serving.main(["--model", "m", "--cpu", *chunks, *output]) == 0
    assert started == [
        (variant, ("--chunked-prefill-size", size))
        for size in ("1024", "8192")
        for variant in ("stock", "tokenweave")
    ]
    result = schema.load(tmp_path / "serving.json")
    assert not result.meta.absent
    assert {(row.shape, row.variant) for row in result.rows} == {
        (f"in512-out128-chunk{size}-all_at_once", variant)
        for size in (1024, 8192)
        for variant in ("stock", "tokenweave")
    }


def test_a_stock_server_can_be_given_variables():
    _, best, _ = contenders("--stock-best", "SIZE_KB=1 --b 2")
    assert best.environment(2, on_cpu=False)["SIZE_KB"] == "1"
    assert best.flags == ("--b", "2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workloads", "chat"], "'chat' is unknown; there are in512-out128"),
        (["--rates", "fast"], "'fast' are no numbers, such as 2,8,inf"),
        (["--rates", "0"], "rates are above 0"),
        (["--chunk-sizes", "1k"], "'1k': expected different numbers of tokens above 0"),
        (["--chunk-sizes", "8,0"], "'8,0': expected different numbers of tokens above 0"),
        (["--chunk-sizes", "8,8"], "'8,8': expected different numbers of tokens above 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        serving.main(["--model", "m", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_client_that_fails_or_hangs_is_named(monkeypatch, tmp_path):
    options = Namespace(shape=None, prompts=1, load_deadline=60, ttft_ms=1.0, tpot_ms=1.0)
    (tmp_path / "hanging.py").write_text("import time\ndef cli_main(): time.sleep(600)\n")
    monkeypatch.setattr(client, "MODULE", "no_such_module")
    named = "in512-out128 at 2 requests a second"
    with pytest.raises(LoadError, match=rf"(?s){named}: the client failed.*no_such_module"):
        serving._drive(options, "m", 1, "in512-out128", 2.0, 0)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(client, "MODULE", "hanging")
    options.load_deadline = 5
    with pytest.raises(LoadError, match=f"{named}: not done in 5 s"):
        serving._drive(options, "m", 1, "in512-out128", 2.0, 0)
    assert not multiprocessing.active_children()


def test_a_client_that_cannot_run_is_known_before_a_server_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(client, "MODULE", "no_such_module")
    monkeypatch.setattr(serving, "running", lambda *_, **__: pytest.fail("a server was started"))
    output = tmp_path / "serving.json"
    command = ["--model", "m", "--cpu", "--commit", "0123456", "--output", str(output)]
    assert serving.main(command) == 2
    said = capsys.readouterr().err
    assert "SGLang's client does not run here; install what it lacks" in said
    assert "No module named 'no_such_module'" in said
    assert not output.exists()


def test_so_is_one_that_lacks_a_library(tmp_path):
    """Its import fails in the process that imports it for all loads."""
    folder = tmp_path / "sglang" / "benchmark"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "serving.py").write_text('raise OSError("libx.so: cannot open shared object file")\n')
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    output = ["--commit", "0123456", "--output", str(tmp_path / "serving.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", "--model", "m", "--cpu", *output],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "SGLang's client does not run here; install what it lacks" in done.stderr
    assert "libx.so: cannot open shared object file" in done.stderr
    assert not (tmp_path / "serving.json").exists()


@rare  # its client and a woven server: tests/test_clients.py
@pytest.mark.server
def test_it_drives_real_servers_with_sglangs_client(model, tmp_path, capsys):
    output = tmp_path / "serving.json"
    command = ["--model", str(model("llama")), "--cpu", "--both=--sleep-on-idle"]
    load_of = ["--workloads", "sharegpt_like", "--prompts", "2", "--rounds", "1"]
    commit = ["--commit", "0123456", "--output", str(output)]
    ours = ["--ours=--tokenweave-min-tokens 64"]
    arguments = [*command, *ours, *load_of, *commit, "--no-comm"]
    assert serving.main(arguments) == 0, capsys.readouterr().err
    rows = schema.load(output).rows
    assert [row.variant for row in rows] == ["no_comm", "stock", "tokenweave"]
    # Drawn with one seed, so that all servers have the same prompts.
    assert rows[0].tokens == rows[1].tokens == rows[2].tokens > 0
    for row in rows:
        assert row.time_us >= row.extra["ttft_us"] > 0
        assert row.extra["tokens_per_s"] > row.extra["requests_per_s"] > 0
    assert "SMOKE TEST" in capsys.readouterr().out
