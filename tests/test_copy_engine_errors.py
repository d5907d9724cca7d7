"""What the copy engines refuse, and where their memory holds what."""

from dataclasses import replace

import pytest
import torch
from enqueuing import EPS, bf16, clusters
from streams import Recorder

from sglang_tokenweave.copy_engine import CopyEngine
from sglang_tokenweave.copy_plan import Channel, Layout, Phase, Region
from sglang_tokenweave.kernels import FP8
from sglang_tokenweave.transport import Slot, SymmetricBuffer

ROWS, HIDDEN = 8, 16


@pytest.fixture
def cluster(monkeypatch):
    with clusters(monkeypatch) as make:
        yield make


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight": bf16(HIDDEN + 8)}, r"weight is \(24,\)"),
        ({"weight": torch.zeros(HIDDEN)}, "weight is .* torch.float32"),
        ({"residual": bf16(ROWS, HIDDEN)}, r"residual is \(8, 16\) .* expected \(4, 16\)"),
        ({"residual": bf16(ROWS, HIDDEN)[::2]}, "residual must be contiguous"),
        ({"slot": Slot(bf16(ROWS, HIDDEN))}, "slot is in no memory"),
        ({"slot": Slot(bf16(65, HIDDEN))}, "slot has 65 rows; this engine serves 1 to 64"),
        ({"slot": Slot(bf16(0, HIDDEN))}, "slot has 0 rows"),
        ({"slot": Slot(bf16(ROWS, HIDDEN + 8))}, r"slot is \(8, 24\)"),
        ({"out": Slot(bf16(ROWS, HIDDEN))}, "result is in no memory"),
        ({"out": Slot(bf16(ROWS - 1, HIDDEN))}, r"result is \(7, 16\)"),
        (
            {"out": Slot(torch.zeros(ROWS, HIDDEN))},
            "result is to be torch.float32; .*_e4m3fn",
        ),
        ({"out": Slot(bf16(ROWS, HIDDEN).to(FP8))}, "only FP8 rows have scales, and they must"),
        ({"out": Slot(bf16(ROWS, HIDDEN), torch.zeros(ROWS))}, "only FP8 rows have scales"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused_and_nothing_is_enqueued(cluster, change, named):
    ranks = cluster(2)

    def enqueue(rank, engine, recorder):
        arguments = {
            "slot": SymmetricBuffer(ranks.x[rank]).slot(0, ROWS),
            "residual": None,
            "weight": bf16(HIDDEN),
            **change,
        }
        with pytest.raises(ValueError, match=named):
            engine.allreduce_rmsnorm(**arguments, eps=EPS, beside=False)
        assert not any(recorder.program.streams.values())

    ranks.on_each_rank(enqueue, can_write_fp8=True)


def test_a_symmetric_region_ends_where_it_ends():
    region = Region(1, (1000, 2000), 64)
    assert region.everywhere(2000, 64) == (1000, 2000)
    assert region.everywhere(2016, 48) == (1016, 2016)
    assert region.everywhere(2016, 49) is None
    assert region.everywhere(1999, 1) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_bytes": 1535}, "scratch memory of 1535 bytes; this layout needs 2560"),
        ({"addresses": (0,)}, "memory of 1 ranks; the layout has 2"),
    ],
    ids=["small", "alone"],
)
def test_memory_that_does_not_fit_is_refused(monkeypatch, change, named):
    Recorder().install(monkeypatch)
    layout = Layout(2, 64, 16, torch.bfloat16)
    scratch = replace(Region(0, (0, 0), layout.num_bytes), **change)
    with pytest.raises(ValueError, match=named):
        CopyEngine(layout, scratch, [], torch.device("cuda", 0))


def test_no_lanes_are_refused(cluster):
    with pytest.raises(ValueError, match="max_lanes 0"):
        cluster(2).on_each_rank(lambda *_: None, max_lanes=0)


def test_other_flags_are_refused(cluster):
    with pytest.raises(ValueError, match="flags 'events': expected 'memory_ops' or 'kernels'"):
        cluster(2).on_each_rank(lambda *_: None, flags="events")


def test_too_few_connections_are_refused(cluster, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(RuntimeError, match=r"CUDA_DEVICE_MAX_CONNECTIONS=1: .* 4 or more"):
        cluster(2).on_each_rank(lambda *_: None)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    cluster(2).on_each_rank(lambda *_: None)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_scratch_memory_holds_each_thing_once(world_size):
    layout = Layout(world_size, capacity=13, hidden_size=24, dtype=torch.float16)
    share = -(-13 // world_size) * 24 * 2
    peers = range(world_size)
    places = [(layout.count(channel), 8) for channel in Channel]
    places += [(layout.flag(c, phase, p), 8) for c in Channel for phase in Phase for p in peers]
    staging = [(layout.staging(c, 1, peer), share) for c in Channel for peer in peers if peer != 1]
    assert all(start % 16 == 0 for start, _ in staging)
    ordered = sorted(places + staging)
    ends = [start + size for start, size in ordered]
    assert all(end <= start for end, (start, _) in zip(ends, ordered[1:], strict=False))
    assert ends[-1] == layout.num_bytes
