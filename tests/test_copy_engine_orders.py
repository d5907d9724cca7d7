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


IN_TWO = {"cut_bytes": 0}  # every share, however small
WHOLE = {}


def explorer(ranks, ops, *, drops=lambda _: False, **options):
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

    programs = ranks.on_each_rank(enqueue, **options)
    pieces = [
        piece(ranks, start, tokens, in_two="cut_bytes" in options)
        for (tokens, _), start in zip(ops, starts, strict=True)
    ]
    return Explorer([program.replace(drops) for program in programs], pieces)


def piece(ranks, start, tokens, *, in_two):
    world_size = ranks.layout.world_size
    slots = [Slot(x[start : start + tokens]) for x in ranks.x]
    owned = [slots[0].owned_rows(owner, world_size) for owner in range(world_size)]
    if in_two:
        middles = [(rows.start + rows.stop) // 2 for rows in owned]
        ends = [
            (rows.start, middle, rows.stop) for rows, middle in zip(owned, middles, strict=True)
        ]
        owned = [slice(*each) for three in ends for each in (three[:2], three[1:])]
    owned = [rows for rows in owned if rows.start < rows.stop]
    return Piece(
        tuple(tuple(slot.tensor[rows.start :].data_ptr() for rows in owned) for slot in slots),
        tuple((rows.stop - rows.start) * ranks.layout.row_bytes for rows in owned),
    )


@pytest.mark.parametrize(
    ("world_size", "ops", "flags", "cut"),
    [
        *((2, [(3, False)], mode, WHOLE) for mode in MODES),
        *((2, [(3, False), (1, False), (2, False)], mode, WHOLE) for mode in MODES),
        *((2, [(2, True), (2, True)], mode, WHOLE) for mode in MODES),
        *((2, [(3, True), (2, False), (2, True)], mode, WHOLE) for mode in MODES),
        *((3, [(3, False)], mode, WHOLE) for mode in MODES),
        (3, [(5, False), (4, False)], "memory_ops", WHOLE),
        *((2, [(4, False)], mode, IN_TWO) for mode in MODES),
        (2, [(4, False), (3, False)], "memory_ops", IN_TWO),
        (2, [(4, True), (2, True)], "memory_ops", IN_TWO),
        (2, [(4, True), (4, False)], "memory_ops", IN_TWO),
    ],
    ids=str,
)
def test_every_order_of_steps_is_right_and_all_go_on(cluster, world_size, ops, flags, cut):
    explorer(cluster(world_size, hidden=8), ops, flags=flags, **cut).explore()


def flag_steps(ranks, kind, value, phase):
    """Return what finds steps on the flag that rank 1 sets on rank 0."""
    rank_of = {scratch.data_ptr(): rank for rank, scratch in enumerate(ranks.scratch)}
    flag = ranks.layout.flag(Channel.IN_LINE, phase, 1)
    return lambda step: (
        isinstance(step, kind) and step.value == value and rank_of.get(step.address - flag) == 0
    )


STEPS = pytest.mark.parametrize(
    ("kind", "value"), [(Wait, 1), (Write, 1), (Write, 0)], ids=["wait", "set", "clearing"]
)


@pytest.mark.parametrize("flags", MODES)
@pytest.mark.parametrize("world_size", [2, 3])
@STEPS
@pytest.mark.parametrize("phase", [Phase.FULL, Phase.DONE])
def test_every_order_finds_a_missing(cluster, phase, kind, value, world_size, flags):
    ranks = cluster(world_size, hidden=8)
    drops = flag_steps(ranks, kind, value, phase)
    with pytest.raises(Broken):
        explorer(ranks, [(3, False)], flags=flags, drops=drops).explore()


@STEPS
@pytest.mark.parametrize("phase", Phase)
def test_every_order_of_two_pieces_finds_a_missing(cluster, phase, kind, value):
    ranks = cluster(2, hidden=8)
    drops = flag_steps(ranks, kind, value, phase)
    with pytest.raises(Broken):
        explorer(ranks, [(4, False)], drops=drops, **IN_TWO).explore()


@pytest.mark.parametrize(
    ("world_size", "beside", "cut"),
    [(2, True, WHOLE), (3, False, WHOLE), (2, False, IN_TWO)],
    ids=["of streams", "of lanes", "of pieces"],
)
def test_every_order_finds_missing_events(cluster, world_size, beside, cut):
    """Each wait for an event is needed: without any one of them, some order is wrong."""
    ops = [(4 if cut else 3, beside)]
    ranks = cluster(world_size, hidden=8)
    explorer(ranks, ops, **cut).explore()
    streams = ranks.recorders[0].program.streams
    waits = [step for steps in streams.values() for step in steps if isinstance(step, After)]
    if beside:
        # The last one joins; a replay of the model, as of a graph, ends with all of its streams.
        assert waits[0] == streams[Recorder.CALLER][-1]
        assert waits.pop(0) in [After(stream, len(steps)) for stream, steps in streams.items()]
    if cut:
        # That its own pieces were sent is what no order of free streams needs: see below.
        # And it joins in the end, likewise.
        on_caller = [step for step in streams[Recorder.CALLER] if isinstance(step, After)]
        assert len(on_caller) == 3
        waits = [wait for wait in waits if wait not in on_caller]
    assert waits
    for wait in waits:
        with pytest.raises(Broken):
            explorer(
                cluster(world_size, hidden=8), ops, drops=lambda s, w=wait: s == w, **cut
            ).explore()


@pytest.mark.parametrize("flags", MODES)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("cut", [WHOLE, IN_TWO], ids=["whole", "in two"])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_a_rank_tells_before_it_waits_in_whatever_order_streams_are_run(
    cluster, world_size, cut, beside, flags
):
    """Streams may share a channel of the hardware, where one's wait holds up the other's steps."""
    ranks = cluster(world_size, hidden=8)
    slots = [SymmetricBuffer(x).slot(0, 64) for x in ranks.x]
    weight = torch.ones(8, dtype=torch.bfloat16)
    programs = ranks.on_each_rank(
        lambda rank, engine, _: engine.allreduce_rmsnorm(
            slots[rank], None, weight, EPS, beside=beside
        ),
        flags=flags,
        **cut,
    )
    channel = Channel(beside)
    for rank, program in enumerate(programs):
        peers = [peer for peer in range(world_size) if peer != rank]
        found = set()
        for stream, steps in program.streams.items():
            for position, step in enumerate(steps):
                for phase in Phase:
                    mine = ranks.scratch[rank].data_ptr()
                    at = [mine + ranks.layout.flag(channel, phase, peer) for peer in peers]
                    if isinstance(step, Wait) and step.address in at:
                        peer = peers[at.index(step.address)]
                        found.add((phase, peer))
                        told = ranks.layout.flag(channel, phase, rank)
                        told += ranks.scratch[peer].data_ptr()
                        assert Write(told, 1) in program.before(stream, position)
        phases = list(Phase) if cut else [Phase.FULL, Phase.DONE]
        assert found == {(phase, peer) for phase in phases for peer in peers}
