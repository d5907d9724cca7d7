"""The benchmarks of prefill and decode: servers, which passes they count, what they leave out."""

import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from living import is_running

from benchmarks import decode, forward_timer, prefill, shapes, timed_servers
from benchmarks.forward_timer import Pass, Settings
from benchmarks.prefill import VARIANTS
from benchmarks.servers import ServerError
from benchmarks.timed_servers import Served
from launch import demo
from sglang_tokenweave import seams

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = prefill.parser().parse_args(["--cpu", "--tp", "1", "--shape", "smoke", "--layers=8"])


def write_passes(folder, rank, *passes):
    with (folder / f"rank{rank}.jsonl").open("a") as file:
        for each in passes:
            file.write(json.dumps(vars(each)) + "\n")


def answer_with(monkeypatch, folder, passes_by_rank):
    def post_json(url, body):
        for rank, passes in enumerate(passes_by_rank):
            write_passes(folder, rank, *passes)

    monkeypatch.setattr(demo, "post_json", post_json)


def test_a_prompts_chunks_are_summed_on_the_slowest_rank(monkeypatch, tmp_path):
    write_passes(tmp_path, 0, Pass("EXTEND", 3, 9.0, 9.0))  # a warm-up, before
    chunks = [
        Pass("EXTEND", 5, 10.0, 4.0),
        Pass("EXTEND", 2, 3.0, 1.0),
        Pass("DECODE", 1, 1.0, 1.0),
    ]
    slower = [Pass("EXTEND", 5, 11.0, 2.0), Pass("EXTEND", 2, 3.5, 1.0)]
    answer_with(monkeypatch, tmp_path, (chunks, slower))
    served = Served(1, tmp_path, world_size=2)
    assert prefill.prefill(served, [7] * 7) == (14.5, 5.0)
    assert prefill.prefill(served, [7] * 7) == (14.5, 5.0)  # only what is new


def test_a_pass_begins_when_its_last_rank_does():
    """A rank that got its request sooner waits for the others: that is not the pass's time."""
    first, second = Pass("EXTEND", 5, 50.0, 20.0, 100.0), Pass("EXTEND", 5, 33.0, 25.0, 115.0)
    assert forward_timer.together([first, second]) == (150.0 - 115.0, 25.0)
    assert forward_timer.together([second, first]) == (150.0 - 115.0, 25.0)
    assert forward_timer.together([first]) == (50.0, 20.0)


def test_passes_of_another_length_are_no_measurement(monkeypatch, tmp_path):
    answer_with(monkeypatch, tmp_path, [[Pass("EXTEND", 6, 1.0, 1.0)]])
    with pytest.raises(ServerError, match=r"rank 0 ran passes of \[6\] tokens for a prompt of 7"):
        prefill.prefill(Served(1, tmp_path, world_size=1), [7] * 7)


def test_a_step_is_the_slower_rank_s_and_has_all_requests(monkeypatch, tmp_path):
    fewer = [Pass("EXTEND", 6, 99.0, 1.0), Pass("DECODE", 2, 99.0, 1.0)]
    steps = [[Pass("DECODE", 3, us, 1.0) for us in rank] for rank in ((5, 5, 1, 5), (1, 9, 7, 1))]
    answer_with(monkeypatch, tmp_path, [fewer + rank for rank in steps])
    served = Served(1, tmp_path, world_size=2)
    assert decode.decode(served, [[7, 7]] * 3, 5) == 6.0  # of 5, 9, 7 and 5
    with pytest.raises(ServerError, match="1 steps decoded all 2 requests together"):
        decode.decode(served, [[7, 7]] * 2, 5)


class Fake:
    """A server whose batches get the plans that it is told."""

    def __init__(self, wall_us, plan):
        self.wall_us, self.plan, self.mode = wall_us, plan, None
        self.counts = {"off": 0, "fuse": 0, "weave": 0} if plan else {}
        self.prompts = []

    def plans(self, mode):
        assert self.mode in (None, mode)
        return dict(self.counts)

    def excuses(self):
        return "no memory was left" if self.plan == "off" else ""

    def passes(self, body):
        ids = body["input_ids"]
        self.prompts.append(str(ids))
        if self.plan:
            self.counts[self.plan] += 1
        decodes = isinstance(ids[0], list)
        self.mode = "decode" if decodes else "prefill"
        one = Pass("DECODE" if decodes else "EXTEND", len(ids), self.wall_us, self.wall_us / 2)
        return [[one] * (4 if decodes else 1)]


def test_a_variant_that_ran_as_something_else_has_no_row():
    servers = {
        "stock/default": Fake(30.0, None),
        "weave/kernel/4": Fake(20.0, "weave"),
        "weave/copy": Fake(10.0, "off"),
        "auto": Fake(15.0, "fuse"),  # whatever it decides
    }
    options = Namespace(**{**vars(OPTIONS), "rounds": 3, "layers": 2})
    rows, absent = prefill._one_length(options, servers, 40)
    found = {row.variant: row for row in rows}
    assert set(found) == {"stock/default", "weave/kernel/4", "auto"}
    assert found["weave/kernel/4"].time_us == 20.0
    assert found["weave/kernel/4"].extra == {"cpu_us_per_layer": 5.0}
    shares = {"off_share": 0.0, "fuse_share": 1.0, "weave_share": 0.0}
    assert found["auto"].extra == {"cpu_us_per_layer": 3.75, **shares}
    assert found["weave/kernel/4"].shape == "smoke-2l-tp1"
    how = "ran as {'off': 4, 'fuse': 0, 'weave': 0}; no memory was left"
    assert absent == {"weave/copy, 40 tokens": how}
    prompts = [prompt for server in servers.values() for prompt in server.prompts]
    assert len(set(prompts)) == len(prompts)  # none is in a cache


def test_decodes_are_of_the_same_prompts_on_every_server():
    servers = {"stock/default": Fake(30.0, None), "fuse": Fake(20.0, "fuse")}
    arguments = ["--cpu", "--tp", "1", "--shape", "smoke", "--rounds=3", "--layers=8"]
    options = decode.parser().parse_args(arguments)
    rows, absent = decode._one_size(options, servers, 5)
    assert absent == {}
    assert [(row.variant, row.tokens, row.time_us) for row in rows] == [
        ("stock/default", 5, 30.0),
        ("fuse", 5, 20.0),
    ]
    assert rows[1].extra == {"tokens_per_s": 250_000.0, "context_tokens": 268}
    stock, fuse = servers.values()
    assert stock.prompts == fuse.prompts
    assert len(set(stock.prompts)) == 4
    servers["fuse"] = Fake(20.0, "off")
    rows, absent = decode._one_size(options, servers, 5)
    assert [row.variant for row in rows] == ["stock/default"]
    how = "ran as {'off': 4, 'fuse': 0, 'weave': 0}; no memory was left"
    assert absent == {"fuse, 5 requests": how}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_server_loads_the_timer_and_only_ours_loads_the_extension(name, tmp_path):
    settings = Settings(str(tmp_path))
    contender = timed_servers.contender(name, VARIANTS[name], ("--a",), settings, tmp_path)
    variables = dict(contender.variables)
    plugins = variables["SGLANG_PLUGINS"].split(",")
    assert forward_timer.NAME in plugins
    is_ours = name.split("/")[0] in ("fuse", "weave", "auto")
    assert ("tokenweave" in plugins) is contender.weaves is is_ours
    assert Settings(**json.loads(variables[forward_timer.SETTINGS])) == settings
    assert contender.flags == ("--a",)
    assert VARIANTS[name].no_communication is (name == "no_comm")


def test_without_communication_only_the_embeddings_are_summed(monkeypatch):
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers import vocab_parallel_embedding as embedding

    group = GroupCoordinator.__new__(GroupCoordinator)
    monkeypatch.setattr(seams, "tensor_parallel_group", lambda: group)
    monkeypatch.setattr(GroupCoordinator, "all_reduce", lambda self, rows: 2 * rows)
    monkeypatch.setattr(embedding, "tensor_model_parallel_all_reduce", group.all_reduce)
    rows = torch.ones(2, 3)
    forward_timer._leave_out_sums(None, None)
    assert group.all_reduce(rows) is rows
    assert torch.equal(embedding.tensor_model_parallel_all_reduce(rows), 2 * rows)


def test_the_plugin_is_found_as_an_installed_one(tmp_path):
    from importlib.metadata import distributions

    folder = forward_timer.folder(tmp_path)
    (found,) = list(distributions(path=[str(folder)]))
    (entry,) = found.entry_points
    assert entry.group == "sglang.srt.plugins"
    assert entry.load() is forward_timer.register


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_are_configurations_that_transformers_reads(name, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(shapes.write(name, 3, tmp_path))
    assert config.num_hidden_layers == 3
    assert config.hidden_size % config.num_attention_heads == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cpu", "--variants", "no_comm"], "no_comm needs GPUs that communicate"),
        (["--emulated-ranks", "2", "--variants", "fuse"], "--tp is 2; with --emulated-ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, said, capsys):
    assert prefill.main(["--shape", "smoke", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_unknown_variants_are_named(capsys):
    with pytest.raises(SystemExit):
        prefill.main(["--variants", "warp"])
    assert "'warp'; known: stock/default" in capsys.readouterr().err


@pytest.mark.server
def test_it_times_real_servers(tmp_path, capsys):
    output = tmp_path / "prefill.json"
    command = ["--cpu", "--tp", "1", "--shape", "smoke", "--layers", "2", "--rounds", "1"]
    chosen = ["--tokens", "600", "--variants", "stock/default", "--commit", "0123456"]
    assert prefill.main([*command, *chosen, "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["time_us"] >= row["cpu_us_per_layer"] * 2 > 0
    assert "SMOKE TEST" in capsys.readouterr().out


@pytest.mark.server
def test_a_benchmark_that_is_asked_to_stop_leaves_no_server(tmp_path):
    command = ["--cpu", "--tp", "1", "--shape", "smoke", "--layers", "2", "--commit", "0123456"]
    output = ["--output", str(tmp_path / "prefill.json"), "--variants", "stock/default"]
    running = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.prefill", *command, *output],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        server = wait_for(lambda: servers_of(running.pid), 120)
        running.terminate()
        _, said = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in said
    assert "Traceback" not in said
    assert not any(map(is_running, server))


def wait_for(condition, deadline_s):
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def servers_of(pid):
    """Return its children that serve: what a library runs at its import may come before them."""
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # it has ended since
            if "launch_server" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found
