"""In which order a candidate's runs and the clock's events reach the device, without a device."""

import pytest
import torch

from sglang_tokenweave.plan import Mode
from sglang_tokenweave.tuning import measure
from sglang_tokenweave.weave import Stage


class Event:
    """One of torch's, which says when it is used; six milliseconds lie between any two."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        LOG.append("event")

    def synchronize(self):
        LOG.append("waits")

    def elapsed_time(self, end):
        return 6.0


LOG: list[object] = []


@pytest.mark.parametrize(
    ("mode", "us", "order"),
    [
        # Behind one of its own, for its power; its start counts: the device has nothing to do.
        (Mode.PREFILL, 6000, ["idle", 0, "idle", "event", 1, "event", "waits"]),
        # Behind one that keeps the device busy, as a server's steps are.
        (Mode.DECODE, 2000, ["idle", 0, "event", 1, 2, 3, "event", "waits"]),
    ],
)
def test_what_is_timed(mode, us, order, monkeypatch):
    LOG.clear()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: LOG.append("idle"))
    device = torch.device("cuda")
    count = measure._in_a_row(mode, device)
    runs = [lambda number=number: LOG.append(number) for number in range(count)]
    assert measure._time_us(runs, device, mode) == us
    assert order == LOG


def test_on_a_cpu_a_run_is_timed_by_itself():
    device = torch.device("cpu")
    assert measure._in_a_row(Mode.DECODE, device) == 1
    assert 0 <= measure._time_us([lambda: None], device, Mode.PREFILL) < 1e6


def test_what_comes_before_layers_left_out_ends_with_the_norm_of_what_comes_after_them():
    def stage(name, norm):
        return Stage(name, norm, 1e-5)

    embedding = stage("embedding", "0 first")
    layers = [
        stage(f"{layer} {part}", norm)
        for layer, after in ((0, "1 first"), (1, "2 first"), (2, "3 first"), (3, "last"))
        for part, norm in (("attention", f"{layer} second"), ("mlp", after))
    ]
    stages = (embedding, *layers)
    assert measure._without_layers(stages, 0) == stages
    two_left_out = (layers[0], stage("0 mlp", "3 first"), *layers[6:])
    assert measure._without_layers(stages, 2) == (embedding, *two_left_out)
    assert measure._without_layers(stages, 3) == (stage("embedding", "3 first"), *layers[6:])
    in_a_later_pipeline_stage = tuple(layers)
    assert measure._without_layers(in_a_later_pipeline_stage, 2) == two_left_out
