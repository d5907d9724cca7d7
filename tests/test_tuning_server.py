"""Real servers that measure, use what was measured or edited, and drop what loses."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import workloads
from safetensors.torch import load_file, save_file
from server import Server, after_import, environment
from thorough import rare
from workloads import Answers

from sglang_tokenweave import cpu
from sglang_tokenweave.plan import Kind, Mode
from sglang_tokenweave.tuning.table import OFF, Table
from sglang_tokenweave.tuning.text import read_file, to_text

pytestmark = pytest.mark.server

SIZES = ("--max-running-requests", "8", "--tokenweave-strict")
COMPARED = ("long_prompt", "short_batch")
# A pair of batches out of four, and as if a planned one took a hundred times as long: what it takes
# beside a stock one in truth is this machine's business of this moment.
LOSES = """
Guard.__init__.__defaults__ = (4, *Guard.__init__.__defaults__[1:])
_add = Guard.add
def add(self, key, *, is_stock, us, num_tokens):
    us = us if is_stock else 100 * us
    return _add(self, key, is_stock=is_stock, us=us, num_tokens=num_tokens)
Guard.add = add
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def measured(model: Callable[[str], Path], cache: dict[str, str]) -> tuple[Path, Table]:
    """Return what a server measured and kept, after it was seen to measure rightly."""
    flags = (*SIZES, "--tokenweave-tune", "force", "--tokenweave-tune-seconds", "60")
    with Server(model("llama"), flags=flags, environment=cache) as server:
        state = server.tokenweave()
        log = server.log()
    assert state is not None
    tuned = state["tuned"]
    assert (tuned["source"], tuned["edited"]) == ("measured", 0)
    assert (state["active"], state["notes"], state["fallbacks"]) == (True, [], {})
    counted = sum(sum(plans.values()) for plans in state["batches"].values())
    assert counted < 10, "what the tuner ran is no batch of anybody"
    path = Path(tuned["path"])
    assert path.parent == Path(cache["XDG_CACHE_HOME"], "sglang_tokenweave", "tables")
    table, _ = read_file(path)
    assert tuned["sizes"] == len(table.buckets)
    lines = re.findall(r"TokenWeave tunes, .*: (\w+) (\d+) tokens", log)
    assert sorted(lines) == sorted((each.mode.value, str(each.tokens)) for each in table.buckets)
    assert len(re.findall(r"TokenWeave tuned in [\d.]+ s", log)) == 1
    return path, table


def test_a_table_holds_every_size_and_stock_beside_the_candidates(
    measured: tuple[Path, Table],
) -> None:
    _, table = measured
    sizes = {(each.mode.value, each.tokens) for each in table.buckets}
    assert {("prefill", n) for n in (64, 128, 256, 512)} <= sizes
    assert {("decode", n) for n in (1, 2, 4)} <= sizes
    assert (table.key.model, table.key.tp_size, table.key.layers) == ("LlamaForCausalLM", 2, 4)
    assert (table.key.gpu, table.key.transport) == ("none", "reference")
    for bucket in table.buckets:
        kinds = {each.candidate.kind for each in bucket.measured}
        assert kinds == ({Kind.OFF, Kind.FUSE, Kind.WEAVE} if bucket.tokens > 1 else kinds)
        off, chosen = bucket.time_of(OFF), bucket.time_of(bucket.chosen)
        assert chosen.us <= off.us, "never slower"


def test_the_next_server_reads_what_a_person_edited_weaves_it_and_drops_what_loses(
    measured: tuple[Path, Table],
    cache: dict[str, str],
    model: Callable[[str], Path],
    stock: Callable[..., Answers],
    tmp_path: Path,
) -> None:
    path, table = measured
    path.write_text(to_text(replace(table, buckets=tuple(map(_woven, table.buckets)))))
    expected = stock("llama", COMPARED)
    loses = after_import(tmp_path, "sglang_tokenweave.tuning.guard", LOSES)
    flags = (*SIZES, "--tokenweave-tune", "auto")
    with Server(model("llama"), flags=flags, environment=cache, pythonpath=[loses]) as server:
        answers = {each: workloads.run(server, each) for each in COMPARED}
        state = server.tokenweave()
        # One request at a time: batches of one mode and one size, again and again.
        for index in range(110):
            request = workloads.greedy_request(workloads.token_ids(900 + index, 64), 1)
            server.generate(**request)
        later = server.tokenweave()
        log = server.log()
    assert state is not None
    assert later is not None
    assert state["tuned"]["source"] == "cache"
    assert state["tuned"]["seconds"] < 2, "warm"
    assert state["tuned"]["edited"] == sum(_woven(each).is_edited for each in table.buckets) > 0
    assert state["tokens"]["prefill"]["weave"] > 0
    assert state["batches"]["decode"]["fuse"] > 0
    assert state["cuts"]["inside"] > 0
    assert not later["fallbacks"]
    for each in COMPARED:
        workloads.assert_equal(expected[each], answers[each])
    assert {"mode": "prefill", "tokens": 64} in later["drops"]
    assert len(re.findall("TokenWeave drops a plan .* prefill batches from 64 tokens", log)) == 1


def test_a_candidate_that_computes_something_else_than_stock_gets_no_table(
    model: Callable[[str], Path], stock: Callable[..., Answers], tmp_path: Path
) -> None:
    """The ranks never get each other's rows."""
    wrong = "_gather = ReferenceTransport._all_gather\n"
    wrong += "ReferenceTransport._all_gather = lambda self, own, out: _gather(self, own, out * 1)"
    loses = after_import(tmp_path, "sglang_tokenweave.reference", wrong)
    cold = {"XDG_CACHE_HOME": str(tmp_path)}
    flags = ("--max-running-requests", "8", "--tokenweave-tune", "force")
    with Server(model("llama"), flags=flags, environment=cold, pythonpath=[loses]) as server:
        state = server.tokenweave()
    assert state is not None
    assert "gives other logits than stock" in " ".join(state["notes"])
    assert state["tuned"] is None


def _woven(bucket):
    """Return a bucket that weaves prompts and decodes by the one-shot op."""
    tried = [each.candidate for each in bucket.measured]
    is_decode = bucket.mode is Mode.DECODE
    (chosen, *_) = [
        each for each in tried if (each.is_one_shot if is_decode else each.kind is Kind.WEAVE)
    ]
    return replace(bucket, chosen=chosen)


def _with_a_large_last_norm(model: Path, copy: Path) -> Path:
    """Return a copy as trained models are: the last norm's weights are no other norm's.

    Four times as large, so all logits are, exactly, and the tokens are the same.
    """
    shutil.copytree(model, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= 4
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    "version", ["0.5.17", *(pytest.param(each, marks=rare) for each in ("0.5.21", "0.5.23"))]
)
def test_other_releases_of_sglang_run_the_same_batches_of_few_layers(
    version: str, model: Callable[[str], Path], stock: Callable[..., Answers], tmp_path: Path
) -> None:
    cold = {"XDG_CACHE_HOME": str(tmp_path)}
    flags = (*SIZES, "--tokenweave-tune", "force", "--tokenweave-tune-seconds", "25")
    shallow = [after_import(tmp_path, "sglang_tokenweave.tuning.measure", "MOST_LAYERS = 2")]
    options = {"flags": flags, "environment": cold, "sglang": version, "pythonpath": shallow}
    expected = stock("llama", COMPARED)["long_prompt"]
    with Server(_with_a_large_last_norm(model("llama"), tmp_path / "model"), **options) as server:
        answers = workloads.run(server, "long_prompt")
        state = server.tokenweave()
    # All layers are back.
    assert [each.tokens for each in answers] == [each.tokens for each in expected]
    assert state is not None
    assert (state["active"], state["notes"]) == (True, [])
    assert state["tuned"]["source"] == "measured"
    assert read_file(Path(state["tuned"]["path"]))[0].key.sglang == version


OTHER_ON_RANK_1 = """
_original = _read_given
def _read_given(path, group):
    return _original(Path(str(path) + ".other") if group.rank == 1 else path, group)
"""


@rare  # in one process: tests/test_tuner.py
def test_ranks_with_different_files_end_with_both_named(
    measured: tuple[Path, Table], model: Callable[[str], Path], tmp_path: Path
) -> None:
    _, table = measured
    path = tmp_path / "tuned.yaml"
    path.write_text(to_text(table))
    path.with_name("tuned.yaml.other").write_text(to_text(replace(table, buckets=())))
    patched = after_import(tmp_path, "sglang_tokenweave.tuning.tuner", OTHER_ON_RANK_1)
    server = Server(model("llama"), flags=("--tokenweave-table", str(path)), pythonpath=[patched])
    server.launch()
    assert server.wait_until_ended(deadline_s=120) != 0
    assert "DisagreementError: the table " in server.log()
    assert re.search(
        r"differs between ranks: rank 0: [0-9a-f]{64}; rank 1: [0-9a-f]{64}", server.log()
    )


def test_tune_writes_a_table_and_leaves_nothing(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "shipped.yaml"
    done = _tune(output, model("llama"), tmp_path, "--tokenweave-tune-seconds", "25")
    assert done.returncode == 0, done.stderr
    assert "TokenWeave tuned in" in done.stderr
    table, _ = read_file(output)
    assert table.buckets
    assert not list(tmp_path.glob("tw-tune-*"))
    assert not _processes_in(tmp_path), "the server is gone"


def test_tune_says_why_there_is_no_table(tmp_path: Path) -> None:
    output = tmp_path / "shipped.yaml"
    done = _tune(output, tmp_path / "no model", tmp_path)
    assert done.returncode == 1
    assert "the server ended with status" in done.stderr
    assert not output.exists()
    assert not list(tmp_path.glob("tw-tune-*"))
    assert not _processes_in(tmp_path)
    for flags, message in (
        (("--port", "1"), "--port is set by this command"),
        (("--output", "/nowhere/x.yaml"), "there is no folder /nowhere"),
    ):
        done = _tune(output, tmp_path, tmp_path, *flags)
        assert done.returncode == 2
        assert message in done.stderr


def _tune(
    output: Path, model: Path, folder: Path, *flags: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *(sys.executable, "-m", "sglang_tokenweave.tune", "--output", str(output)),
            *("--wait", "170", "--model-path", str(model), *cpu.server_arguments(2)),
            *("--max-running-requests", "4", *flags),
        ],
        env={**environment(2), "TMPDIR": str(folder), "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )


def _processes_in(folder: Path) -> list[str]:
    """Return the processes that were started with this folder for temporary files."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={folder}\0".encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:
            continue  # it ended meanwhile, or is another user's
    return found
