"""The copy engines' host code: what each rank enqueues, in every order and in random ones."""

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from exploring import Broken, Explorer
from exploring import Slot as Piece
from in_process import World
from streams import After, Copy, Recorder, Run, Stuck, Wait, Write

from sglang_tokenweave import copy_engine, driver, watchdog
from sglang_tokenweave.agreement import DisagreementError
from sglang_tokenweave.copy_engine import MAX_LANES, CopyEngine
from sglang_tokenweave.copy_plan import Channel, Layout, Phase, Region
from sglang_tokenweave.kernels import FP8
from sglang_tokenweave.transport import Slot, SymmetricBuffer

EPS = 1e-5
MODES = ("memory_ops", "kernels")


class Cluster:
    """Ranks in one process: what an engine needs, in a CPU's memory, and what each enqueued."""

    def __init__(self, monkeypatch, world_size, capacity=64, hidden=16, dtype=torch.bfloat16):
        self.monkeypatch = monkeypatch
        self.layout = Layout(world_size, capacity, hidden, dtype)
        ranks = range(world_size)
        self.x = [torch.full((capacity, hidden), torch.nan, dtype=dtype) for _ in ranks]
        self.out = [torch.full((capacity, hidden), torch.nan).to(FP8) for _ in ranks]
        self.scales = [torch.full((capacity,), torch.nan) for _ in ranks]
        self.scratch = [torch.zeros(self.layout.num_bytes, dtype=torch.uint8) for _ in ranks]
        self.recorders = [Recorder() for _ in ranks]
        self.engines = []
        self.results = {}
        self.num_checks = 0

    def region(self, rank, tensors):
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        return Region(rank, addresses, tensors[0].numel() * tensors[0].itemsize)

    def on_each_rank(self, enqueue, **options):
        """Call `enqueue(rank, engine, recorder)` as each rank, once; return the programs."""
        for rank, recorder in enumerate(self.recorders):
            recorder.install(self.monkeypatch)
            regions = [self.region(rank, each) for each in (self.x, self.out, self.scales)]
            scratch = self.region(rank, self.scratch)
            device = torch.device("cuda", 0)
            engine = CopyEngine(self.layout, scratch, regions, device, **options)
            self.engines.append(engine)
            enqueue(rank, engine, recorder)
        return [recorder.program for recorder in self.recorders]

    def close(self):
        for engine, recorder in zip(self.engines, self.recorders, strict=False):
            recorder.install(self.monkeypatch)
            engine.close()
            assert not recorder.live


@pytest.fixture
def cluster(monkeypatch):
    made = []

    def make(*arguments, **options):
        made.append(Cluster(monkeypatch, *arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


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


@dataclass(frozen=True)
class Op:
    """One op of a program, and what the caller does around it."""

    start: int
    tokens: int
    beside: bool = False
    has_residual: bool = True
    weight_offset: float = 0.0
    output: str = "in place"


PROGRAMS = {
    "one token": [Op(0, 1)],
    "in line": [Op(0, 13), Op(13, 8, has_residual=False), Op(21, 40, weight_offset=1.0)],
    "woven": [Op(0, 33, beside=True), Op(33, 31), Op(0, 33, beside=True), Op(33, 31, beside=True)],
    "elsewhere": [Op(0, 15, output="rows"), Op(30, 9, beside=True, output="rows")],
    "quantised": [Op(0, 21, output="fp8"), Op(21, 40, beside=True, output="fp8")],
}
POISONED = slice(61, 64)  # rows that no op may touch, apart from "woven"


def data(op, replay, number, layout):
    """Return partial sums by rank, residual and weight: equal on all ranks that ask."""
    generator = torch.Generator().manual_seed(1000 * number + replay)
    shapes = (
        (layout.world_size, op.tokens, layout.hidden_size),
        (op.tokens, layout.hidden_size),
        (layout.hidden_size,),
    )
    return [torch.randn(shape, generator=generator).to(layout.dtype) for shape in shapes]


class Caller:
    """One op as one rank: fills its inputs, enqueues it, checks its result against float64."""

    def __init__(self, ranks, rank, number, op):
        self.ranks, self.rank, self.number, self.op = ranks, rank, number, op
        self.slot = SymmetricBuffer(ranks.x[rank]).slot(op.start, op.start + op.tokens)
        self.owned = self.slot.owned_rows(rank, ranks.layout.world_size)
        num_owned = self.owned.stop - self.owned.start
        hidden, dtype = ranks.layout.hidden_size, ranks.layout.dtype
        self.residual = torch.empty(num_owned, hidden, dtype=dtype) if op.has_residual else None
        self.weight = torch.empty(hidden, dtype=dtype)
        rows = slice(op.start, op.start + op.tokens)
        self.out = self.slot
        if op.output == "rows":
            self.out = SymmetricBuffer(ranks.x[rank]).slot(rows.stop, rows.stop + op.tokens)
        if op.output == "fp8":
            self.out = SymmetricBuffer(ranks.out[rank], ranks.scales[rank]).slot(
                rows.start, rows.stop
            )

    def fill(self, replay):
        partials, residual, weight = data(self.op, replay, self.number, self.ranks.layout)
        self.slot.tensor.copy_(partials[self.rank])
        self.weight.copy_(weight)
        if self.residual is not None:
            self.residual.copy_(residual[self.owned])

    def start(self, engine):
        return engine.allreduce_rmsnorm(
            self.slot,
            self.residual,
            self.weight,
            EPS,
            beside=self.op.beside,
            weight_offset=self.op.weight_offset,
            out=None if self.out is self.slot else self.out,
        )

    def check(self, replay):
        partials, residual, weight = data(self.op, replay, self.number, self.ranks.layout)
        total = partials.double().sum(0)
        if self.residual is not None:
            total += residual.double()
            # Sums of at most 9 values in float32, and one rounding to bfloat16.
            torch.testing.assert_close(
                self.residual.double(), total[self.owned], rtol=2.0**-8, atol=1e-5
            )
        scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
        expected = total * scale * (self.op.weight_offset + weight.double())
        found, tolerance = self.out.tensor.double(), {"rtol": 2.0**-8, "atol": 1e-5}
        if self.out.scales is not None:
            found *= self.out.scales.double()[:, None]
            # Half of a digit's place, of 3 stored; the least is 2^-9 of a scale.
            tolerance = {"rtol": 2.0**-4, "atol": 2.0**-10 * self.out.scales.max().item() * 1.01}
        torch.testing.assert_close(found, expected, **tolerance)
        bits = self.out.tensor.view(torch.int8).clone()
        assert torch.equal(self.ranks.results.setdefault((replay, self.number), bits), bits)
        self.ranks.num_checks += 1


def enqueue_program(ranks, ops):
    def enqueue(rank, engine, recorder):
        callers = [Caller(ranks, rank, number, op) for number, op in enumerate(ops)]
        before = None
        for caller in callers:
            recorder.call(caller.fill)
            pending = caller.start(engine)
            # Two ops beside one another, as in the weave, if they are on two channels.
            if before is not None:
                before[1].wait()
                recorder.call(before[0].check)
            before = (caller, pending)
        before[1].wait()
        recorder.call(before[0].check)

    return enqueue


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [*((size, "memory_ops") for size in (2, 4, 6, 8)), (2, "kernels"), (4, "kernels")],
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_random_orders_agree_with_float64(cluster, world_size, name, flags):
    ranks = cluster(world_size)
    enqueue = enqueue_program(ranks, PROGRAMS[name])
    programs = ranks.on_each_rank(enqueue, flags=flags, can_write_fp8=True)
    for seed, late_rank in enumerate((None, 0, world_size - 1)):
        for scratch in ranks.scratch:
            assert not scratch[: 2 * 2 * 8 * world_size].any()  # all flags are cleared
        ranks.results.clear()
        ranks.num_checks = 0
        Run(programs, seed, late_rank).replay(3)
        assert ranks.num_checks == 3 * world_size * len(PROGRAMS[name])
    for x in ranks.x:
        assert x[POISONED].isnan().all() or name == "woven"
    if flags == "memory_ops":
        num_ops = {
            ch: 9 * sum(op.beside == (ch == Channel.BESIDE) for op in PROGRAMS[name])
            for ch in Channel
        }
        for engine in ranks.engines:
            assert engine._board.shown() == {ch: (0, num) for ch, num in num_ops.items()}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("dead_after", [0, 1])
def test_ranks_that_wait_for_a_dead_one_end(cluster, monkeypatch, capfd, beside, dead_after):
    """What streams show and the watchdog reads, up to the end of the process."""
    ended = []
    monkeypatch.setattr(watchdog.os, "abort", lambda: ended.append(1))
    ranks = cluster(3)
    weight = torch.ones(16, dtype=torch.bfloat16)

    def enqueue(rank, engine, _):
        slot = SymmetricBuffer(ranks.x[rank]).slot(0, 7)
        for _ in range(dead_after + (rank != 1)):
            engine.allreduce_rmsnorm(slot, None, weight, EPS, beside=beside).wait()

    programs = ranks.on_each_rank(enqueue, deadline_s=0.5)
    with pytest.raises(Stuck):
        Run(programs, seed=0).replay(1)
    until = time.monotonic() + 20
    while len(ended) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    messages = sorted(capfd.readouterr().err.splitlines())
    assert len(messages) == 2
    name = "BESIDE" if beside else "IN_LINE"
    for rank, message in zip((0, 2), messages, strict=True):
        assert message.startswith(f"tokenweave: rank {rank} (process ")
        assert (
            f"channel {name}, op {dead_after}: a stream has waited 0.5 s for flags FULL: "
            "rank 1's: expected 1, seen 0; those ranks hang"
        ) in message


# How it is enqueued.


def test_copies_are_spread_over_lanes_and_peers(cluster):
    ranks = cluster(8)
    slot = [SymmetricBuffer(x).slot(0, 64) for x in ranks.x]
    weight = torch.ones(16, dtype=torch.bfloat16)
    programs = ranks.on_each_rank(
        lambda rank, engine, _: engine.allreduce_rmsnorm(
            slot[rank], None, weight, EPS, beside=False
        )
    )
    first_targets = set()
    for program in programs:
        copies = {
            stream: [step for step in steps if isinstance(step, Copy)]
            for stream, steps in program.streams.items()
        }
        per_lane = sorted(len(each) for each in copies.values() if each)
        assert per_lane == [2, 4, 4, 4]
        assert len(per_lane) == MAX_LANES
        assert all(copy.num_bytes == 8 * 16 * 2 for each in copies.values() for copy in each)
        first_targets.add(copies[Recorder.CALLER][0].target)
    # The first copies of all ranks go to different ranks.
    owners = {
        rank
        for target in first_targets
        for rank, scratch in enumerate(ranks.scratch)
        if 0 <= target - scratch.data_ptr() < scratch.numel()
    }
    assert owners == set(range(8))


def test_nothing_is_made_and_no_wait_is_on_a_lane_after_the_start(cluster):
    ranks = cluster(4)
    slots = [SymmetricBuffer(x).slot(0, 64) for x in ranks.x]
    weight = torch.ones(16, dtype=torch.bfloat16)

    def enqueue(rank, engine, recorder):
        before = list(recorder.live)
        for beside in (False, True) * 40:
            engine.allreduce_rmsnorm(slots[rank], None, weight, EPS, beside=beside).wait()
        assert recorder.live == before
        plans = engine._plan.cache_info()
        assert (plans.misses, plans.hits) == (2, 78)

    for program in ranks.on_each_rank(enqueue):
        waiting = [
            stream
            for stream, steps in program.streams.items()
            if any(isinstance(step, Wait) for step in steps)
        ]
        assert len(waiting) == 2  # the caller's, and the one beside
        assert Recorder.CALLER in waiting


# A group's engines.


class Memory:
    """Stands for PeerMemory; `live` has what is not closed."""

    live: ClassVar[list] = []

    def __init__(self, num_bytes, _device, group):
        self.memory = torch.zeros(num_bytes, dtype=torch.uint8)
        self.addresses = group.gather(self.memory.data_ptr())
        self.live.append(self)

    def close(self):
        self.live.remove(self)


@pytest.mark.parametrize("failing", ["", "cuMemHostAlloc", "cuEventCreate", "cuFuncLoad"])
def test_engines_of_a_group_are_made_on_all_ranks_or_on_none(monkeypatch, failing):
    world = World(3)
    recorders = [Recorder(failing if rank == 1 else "") for rank in range(3)]
    recorders[0].install(monkeypatch)
    monkeypatch.setattr(driver, "bindings", lambda: recorders[world.rank])
    monkeypatch.setattr(copy_engine, "PeerMemory", Memory)

    def make(group):
        x = bf16(64, HIDDEN)
        addresses = group.gather(x.data_ptr())
        layout = Layout(3, 64, HIDDEN, torch.bfloat16)
        engine = CopyEngine.create(group, torch.device("cuda", 0), layout, [])
        engine.add_region(Region(group.rank, tuple(addresses), x.nbytes))
        slot = SymmetricBuffer(x).slot(0, 64)
        engine.allreduce_rmsnorm(slot, None, bf16(HIDDEN), EPS, beside=False)
        group.gather(None)
        assert len(Memory.live) == 3
        group.gather(None)
        engine.close()
        return any(isinstance(s, Wait) for s in recorders[group.rank].program.streams[1])

    outcomes = world.run(make)
    if failing:
        assert all(isinstance(outcome, DisagreementError) for outcome in outcomes)
        assert f"copy engine failed on rank 1: {failing}: CUDA_ERROR_OUT" in str(outcomes[0])
    else:
        assert outcomes == [True] * 3
    assert not Memory.live
    assert not any(recorder.live for recorder in recorders)


# Errors.

ROWS, HIDDEN = 8, 16


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


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
