"""Profiles as they are written: files, events, streams, GPUs, and the steps in them."""

import gzip
import importlib
import re

import pytest
from made_up_traces import (
    ATTENTION,
    BASE_US,
    GEMM,
    NCCL,
    copied,
    event,
    measured,
    merged,
    whole,
    woven,
    write,
)

from sglang_tokenweave.timeline import overlap, steps
from sglang_tokenweave.timeline.trace import TraceError, load, parse

# --- steps


def test_steps_are_found_on_all_streams_and_the_longest_is_shown():
    later = [
        {**each, "ts": round(each["ts"] + 1000, 3)}
        if each["cat"] != "gpu_user_annotation"
        else {**each, "ts": round(each["ts"] + 1000, 3), "args": {"External id": 77}}
        for each in woven(2)
    ]
    trace = parse(whole([*later, *woven(3)]), "made up")
    found = steps.steps(trace)
    assert [step.name for step in found] == [f"step[EXTEND bs=1 toks={n}]" for n in (300, 200)]
    assert [len(step.activities) for step in found] == [36, 24]
    assert steps.choose(trace, None).index == 0
    assert steps.choose(trace, 1) == found[1]
    with pytest.raises(TraceError, match="no step 2; it has 2"):
        steps.choose(trace, 2)


def test_steps_without_identities_are_told_apart_by_time():
    events = [{**each, "args": {k: v for k, v in each["args"].items() if k != "External id"}}
              for each in woven(1)]  # fmt: skip
    again = [{**each, "ts": round(each["ts"] + 500, 3)} for each in events]
    found = steps.steps(parse(whole([*events, *again]), "made up"))
    assert [len(step.activities) for step in found] == [12, 12]


def test_a_profile_without_steps_is_one():
    found = steps.steps(parse(whole([event(NCCL, 0, 1)]), "made up"))
    assert [(step.name, len(step.activities)) for step in found] == [(steps.WHOLE, 1)]


# --- files


def test_plain_and_compressed_files_read_alike(tmp_path):
    plain = load(write(tmp_path / "a.trace.json", woven(2)))
    compressed = load(write(tmp_path / "a.trace.json.gz", woven(2)))
    assert plain.activities == compressed.activities
    first = plain.activities[0]
    assert (first.start, first.end) == (round(BASE_US * 1000), round(BASE_US * 1000) + 5000)
    assert first.name == ATTENTION


def test_the_profiler_of_this_machine_writes_what_is_refused_by_name(tmp_path):
    torch = importlib.import_module("torch")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(4, 4) @ torch.ones(4, 4)
    path = tmp_path / "cpu.trace.json.gz"
    profile.export_chrome_trace(str(path))
    with pytest.raises(TraceError, match=r"no GPU activity among \d+ events; profile a server on"):
        load(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no Chrome trace, not even JSON"),
        (b"\xff\xfe", "no Chrome trace, not even JSON"),
        (b'{"rows": []}', "no list `traceEvents`"),
        (b"[]", "no GPU activity among 0 events"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-12], "cannot be read: "),
        (b"[" * 100_000, "no Chrome trace, not even JSON"),
    ],
)
def test_files_that_are_no_profile_are_refused(tmp_path, content, said):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=re.escape(said)):
        load(path)
    with pytest.raises(TraceError, match="cannot be read: "):
        load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ts": "soon"}, r"traceEvents\[7\]: ts: got 'soon'; expected microseconds"),
        ({"ts": float("nan")}, r"traceEvents\[7\]: ts: got nan; expected microseconds"),
        ({"dur": None}, r"traceEvents\[7\]: dur: got None; expected microseconds"),
        ({"dur": -1.0}, r"traceEvents\[7\]: dur: got -1.0; expected 0 or more microseconds"),
        ({"args": {"device": "x"}}, r"traceEvents\[7\]: device: got 'x'; expected an integer"),
    ],
)
def test_broken_events_are_named(change, said):
    with pytest.raises(TraceError, match=said):
        parse(whole([{**event(NCCL, 0, 1), **change}]), "made up")


def test_streams_are_taken_from_pid_and_tid_where_args_lack_them():
    old = event(NCCL, 0, 1)
    old["args"] = {}
    assert parse([{**old, "pid": "0", "tid": "7", "cat": "Kernel"}], "made up").activities[
        0
    ].lane == (0, 7)


def test_a_gpu_must_be_chosen_among_several():
    trace = parse(whole([event(NCCL, 0, 1), event(NCCL, 0, 2, device=1)]), "made up")
    with pytest.raises(TraceError, match="it shows GPUs 0, 1; choose one with --device"):
        trace.of_device(None)
    with pytest.raises(TraceError, match="no GPU 3; it shows GPUs 0, 1"):
        trace.of_device(3)
    assert [each.end - each.start for each in trace.of_device(1).activities] == [2000]


def test_merged_profiles_of_all_ranks_hold_each_ranks_own():
    for events in (woven(2), copied(3)):
        second = [
            {**each, "pid": 1, "args": {**each["args"], "device": 1, "inDevice": 1}}
            for each in events
        ]
        trace = parse(whole([*merged(events, 0), *merged(second, 1)]), "made up")
        assert trace.devices == (0, 1)
        for device in (0, 1):
            step = steps.choose(trace.of_device(device), None)
            assert overlap.measure(step, None, "made up").total == measured(events).total


def test_a_step_that_communicates_nothing_is_refused():
    with pytest.raises(TraceError, match="no communication among 1 activities of step 0"):
        measured([event(GEMM, 0, 1)])
