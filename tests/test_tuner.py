"""Which table is used: given, kept, or none; what ranks make of different ones."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from in_process import World
from tuned_tables import KEY, WEAVE, bucket, table

from sglang_tokenweave.agreement import DisagreementError
from sglang_tokenweave.config import ConfigError, TokenWeaveConfig
from sglang_tokenweave.plan import MOST_TWO_SHOT_TOKENS
from sglang_tokenweave.tuning import cache, given, here, tuner
from sglang_tokenweave.tuning.nodes import TableError
from sglang_tokenweave.tuning.text import to_text

GOOD = table(bucket(64), bucket(1024, WEAVE))
OTHER = table(bucket(64), bucket(1024))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "tuned.yaml"
    found.write_text(to_text(GOOD))
    return found


def config(**options):
    return TokenWeaveConfig(enabled=True, **{"strict": True, **options})


def find(key=KEY, ranks=2, **options):
    return World(ranks).run(lambda group: tuner.find(config(**options), key, group))


def test_off_and_no_file_means_thresholds():
    cache.store(GOOD)
    assert find(tune="off") == [None, None]
    assert find(min_tokens=64, tune="off") == [None, None]
    assert find(tune="force") == [None, None]


@pytest.mark.parametrize("tune", ["off", "auto"])
def test_a_given_file_comes_before_a_kept_one(path, tune):
    cache.store(OTHER)
    for found in find(table=str(path), tune=tune):
        assert (found.table, found.source, found.path) == (GOOD, "file", str(path))


def test_a_kept_table_reaches_all_ranks_from_rank_0(monkeypatch):
    kept = cache.store(GOOD)
    load = cache.load
    calls = []
    monkeypatch.setattr(cache, "load", lambda key: calls.append(key) or load(key))
    for found in find(tune="auto", ranks=3):
        assert (found.table, found.source, found.path) == (GOOD, "cache", str(kept))
    assert calls == [KEY]


def test_nothing_kept_means_that_auto_measures():
    assert find(tune="auto") == [None, None]


def test_a_file_of_another_key_is_refused_on_all_ranks_with_what_differs(path):
    for found in find(replace(KEY, gpu="NVIDIA B200"), table=str(path)):
        assert isinstance(found, TableError)
        assert str(found).endswith(
            "tuned.yaml is of another key: gpu 'NVIDIA H200' (here 'NVIDIA B200')"
        )


def test_ranks_that_read_different_files_say_so(path, monkeypatch):
    def read(group):
        return tuner.find(config(table=str(path) + ".other" * group.rank), KEY, group)

    path.with_name("tuned.yaml.other").write_text(to_text(OTHER))
    for found in World(2).run(read):
        assert isinstance(found, DisagreementError)
        assert "tuned.yaml" in str(found)
        assert "differs between ranks: rank 0: " in str(found)


def test_a_file_that_one_rank_cannot_read_is_named_on_all(path):
    def read(group):
        return tuner.find(config(table=str(path) + ".none" * group.rank), KEY, group)

    for found in World(2).run(read):
        assert isinstance(found, DisagreementError)
        assert "rank 1: table " in str(found)
        assert "No such file" in str(found)


def test_a_file_that_no_rank_can_read_is_an_error_of_the_file(path):
    path.write_text("format: 2")
    for found in find(table=str(path)):
        assert isinstance(found, TableError)
        assert "tuned.yaml, line 1" in str(found)


def test_reports_are_plain_and_count_choices_by_hand(path):
    edited = replace(GOOD, buckets=(replace(GOOD.buckets[1], chosen=WEAVE), bucket(64, WEAVE)))
    found = tuner.Tuned(replace(edited, buckets=edited.buckets), "file", str(path), 0.5)
    facts = found.as_dict()
    assert facts["age_s"] is not None
    assert (facts["sizes"], facts["edited"], facts["source"]) == (2, 0, "file")
    hand = tuner.Tuned(OTHER, "file", str(path), 0.5)
    assert hand.as_dict()["edited"] == 2
    assert "2 choices made by hand" in hand.summary()
    odd = tuner.Tuned(replace(GOOD, measured_at="yesterday"), "file", "", 0.5)
    assert odd.as_dict()["age_s"] is None
    assert odd.summary().endswith("not kept")


def test_only_force_writes_to_the_named_file(path):
    before = path.read_text()
    kept = tuner._keep(config(table=str(path), tune="auto"), OTHER)
    assert kept == str(cache.path_of(KEY))
    assert path.read_text() == before
    assert tuner._keep(config(table=str(path), tune="force"), OTHER) == str(path)
    assert path.read_text() == to_text(OTHER)
    assert tuner._keep(config(table=str(path / "no" / "folder"), tune="force"), OTHER) == ""


def test_what_may_be_tried_depends_on_who_moves_the_bytes():
    def tried(transport, *, has_copy_engines=False, **options):
        key = replace(KEY, transport=transport)
        found = tuner.space(
            config(**options),
            key,
            has_copy_engines=has_copy_engines,
            has_one_shot=True,
            has_two_shot=transport == "peer",
            smallest_woven_decode=2,
        )
        assert found.has_one_shot
        assert found.alike_tokens == (MOST_TWO_SHOT_TOKENS if transport == "peer" else 0)
        return found.ctas, found.fuse_ctas

    assert tried("peer", has_copy_engines=True) == ((8, 0, 16, 4), (16, 32, 8))
    assert tried("multicast") == ((8, 16, 4), (16, 32, 8))
    assert tried("reference") == ((8,), (16,))
    assert tried("peer", ctas=12, fuse_ctas=24) == ((12, 8, 16, 4), (24, 16, 32, 8))


@pytest.mark.parametrize(
    ("sizes", "cuts", "smallest"),
    [((), True, 2), ((1, 2, 512), True, 256), ((1, 2, 512), False, 513), ((), False, 2)],
)
def test_decodes_are_woven_where_graphs_do_not_forbid_it(sizes, cuts, smallest):
    model_runner = SimpleNamespace(decode_cuda_graph_runner=SimpleNamespace(capture_bs=sizes))
    runtime = SimpleNamespace(cuts_captured_decodes=cuts)
    assert tuner._smallest_woven_decode(model_runner, runtime) == smallest


def test_sizes_are_what_the_server_can_batch():
    runner = SimpleNamespace(
        max_total_num_tokens=3000,
        page_size=1,
        model_config=SimpleNamespace(context_len=4096),
        req_to_token_pool=SimpleNamespace(size=6),
    )
    runtime = SimpleNamespace(buffer=SimpleNamespace(capacity=512))
    found = tuner._sizes(runner, runtime)
    prefill = [tokens for mode, tokens in found if mode == "prefill"]
    assert prefill == [64, 128, 256, 512]
    assert [tokens for mode, tokens in found if mode == "decode"] == [1, 2, 4, 6]
    runner.decode_cuda_graph_runner = SimpleNamespace(capture_bs=[1, 2, 3])
    assert [tokens for mode, tokens in tuner._sizes(runner, runtime) if mode == "decode"] == [
        1,
        2,
        3,
    ]
    runner.model_config.context_len = 100  # 512 tokens are six requests, and 384 four
    runner.req_to_token_pool.size = 4
    assert [tokens for mode, tokens in tuner._sizes(runner, runtime) if mode == "prefill"] == [
        64,
        128,
        256,
    ]


def test_a_named_file_is_checked_before_anything_starts(path, tmp_path):
    given.check(config())
    given.check(config(table=str(path)))
    path.write_text(path.read_text().replace("kind: weave", "kind: wave"))
    with pytest.raises(TableError, match=r"tuned\.yaml, line \d+, field buckets\[0\]\.measured"):
        given.check(config(table=str(path), tune="auto"))
    with pytest.raises(TableError, match="cannot be read"):
        given.check(config(table=str(tmp_path / "none.yaml")))
    given.check(config(table=str(tmp_path / "none.yaml"), tune="force"))
    with pytest.raises(TableError, match=r"--tokenweave-table .table. is .*; there is no folder"):
        given.check(config(table=str(tmp_path / "no" / "x.yaml"), tune="force"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "on"}, r"--tokenweave-tune .tune. is 'on'; allowed: off, auto, force"),
        ({"tune_seconds": 0}, "--tokenweave-tune-seconds .* is 0; it must be at least 1"),
        ({"table": None}, "--tokenweave-table .* it must be of type str"),
    ],
)
def test_options(options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_a_machine_without_nvml_has_a_key_too(monkeypatch, caplog):
    def fail():
        raise OSError("no libnvidia-ml.so.1")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=fail))
    assert here._driver(torch.device("cuda", 0)) == "unknown"
    assert "cannot tell the driver that a tuned table is of: no libnvidia" in caplog.text
    assert here._driver(torch.device("cpu")) == "none"
