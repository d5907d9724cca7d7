"""What the copy engines' host code enqueues on 2 and 3 ranks, in every order of its steps."""

import pytest
import torch
from enqueuing import EPS, MODES, clusters
from exploring import Broken, Explorer
from exploring import Slot as Piece
from streams import After, Recorder, Wait, Write

from sglang_tokenweave.copy_plan import Channel, Phase
from sglang_tokenweave.transport import Slot, SymmetricBuffer


@pytest.fixture
def cluster(monkeypatch):
    with clusters(monkeypatch) as make:
        yield make


def explorer(ranks, ops, *, flags="memory_ops", drops=lambda _: False):
    """Enqueue ops (number of tokens, beside), each on a slot of its own that the caller fills."""
    starts = [sum(tokens for tokens, _ in ops[:i]) for i in range(len(ops))]
    weight = torch.ones(ranks.layout.hidden_size, dtype=ranks.layout.dtype)

    def enqueue(rank, engine, recorder):
        pending = []
        for op, ((tokens, beside), start) in enumerate(zip(ops, starts, strict=True)):
            # As the weave does: one half communicates, the other one computes.
            if len(pending) > 1:
                pending.pop(0).wait()
            recorder.call(lambda _: None, op)
            slot = SymmetricBuffer(ranks.x[rank]).slot(start, start + tokens)
            pending.append(engine.allreduce_rmsnorm(slot, None, weight, EPS, beside=beside))
        for each in pending:
            each.wait()

    programs = ranks.on_each_rank(enqueue, flags=flags)
    pieces = [piece(ranks, start, tokens) for (tokens, _), start in zip(ops, starts, strict=True)]
    return Explorer([program.replace(drops) for program in programs], pieces)


def piece(ranks, start, tokens):
    world_size = ranks.layout.world_size
    slots = [Slot(x[start : start + tokens]) for x in ranks.x]
    owned = [slots[0].owned_rows(owner, world_size) for owner in range(world_size)]
    owned = [rows for rows in owned if rows.start < rows.stop]
    return Piece(
        tuple(tuple(slot.tensor[rows.start :].data_ptr() for rows in owned) for slot in slots),
        tuple((rows.stop - rows.start) * ranks.layout.row_bytes for rows in owned),
    )


@pytest.mark.parametrize(
    ("world_size", "ops", "flags"),
    [
        *((2, [(3, False)], mode) for mode in MODES),
        *((2, [(3, False), (1, False), (2, False)], mode) for mode in MODES),
        *((2, [(2, True), (2, True)], mode) for mode in MODES),
        *((2, [(3, True), (2, False), (2, True)], mode) for mode in MODES),
        *((3, [(3, False)], mode) for mode in MODES),
        (3, [(5, False), (4, False)], "memory_ops"),
    ],
    ids=str,
)
def test_every_order_of_steps_is_right_and_all_go_on(cluster, world_size, ops, flags):
    explorer(cluster(world_size, hidden=8), ops, flags=flags).explore()


@pytest.mark.parametrize("flags", MODES)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("kind", "value"), [(Wait, 1), (Write, 1), (Write, 0)], ids=["wait", "set", "clearing"]
)
@pytest.mark.parametrize("phase", Phase)
def test_every_order_finds_a_missing(cluster, phase, kind, value, world_size, flags):
    ranks = cluster(world_size, hidden=8)
    rank_of = {scratch.data_ptr(): rank for rank, scratch in enumerate(ranks.scratch)}
    flag = ranks.layout.flag(Channel.IN_LINE, phase, 1)  # that rank 1 sets on rank 0

    def drops(step):
        return (
            isinstance(step, kind) and step.value == value and rank_of.get(step.address - flag) == 0
        )

    with pytest.raises(Broken):
        explorer(ranks, [(3, False)], flags=flags, drops=drops).explore()


@pytest.mark.parametrize(
    ("world_size", "beside"), [(2, True), (3, False)], ids=["of streams", "of lanes"]
)
def test_every_order_finds_missing_events(cluster, world_size, beside):
    """Each wait for an event is needed: without any one of them, some order is wrong."""
    ops = [(3, beside)]
    ranks = cluster(world_size, hidden=8)
    explorer(ranks, ops).explore()
    streams = ranks.recorders[0].program.streams
    waits = [step for steps in streams.values() for step in steps if isinstance(step, After)]
    if beside:
        # The last one joins; a replay of the model, as of a graph, ends with all of its streams.
        assert waits[0] == streams[Recorder.CALLER][-1]
        assert waits.pop(0) in [After(stream, len(steps)) for stream, steps in streams.items()]
    assert waits
    for wait in waits:
        with pytest.raises(Broken):
            explorer(cluster(world_size, hidden=8), ops, drops=lambda s, w=wait: s == w).explore()
