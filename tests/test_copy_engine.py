"""The copy engines' host code: what ranks enqueue, run in random orders and read as it stands."""

import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from enqueuing import EPS, bf16, clusters
from in_process import World
from streams import Copy, Recorder, Run, Stuck, Wait

from sglang_tokenweave import copy_engine, driver, watchdog
from sglang_tokenweave.agreement import DisagreementError
from sglang_tokenweave.copy_engine import MAX_LANES, CopyEngine
from sglang_tokenweave.copy_plan import CUT_BYTES, Channel, Layout, Region
from sglang_tokenweave.transport import SymmetricBuffer


@pytest.fixture
def cluster(monkeypatch):
    with clusters(monkeypatch) as make:
        yield make


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
ROW_BYTES = 16 * 2
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
@pytest.mark.parametrize("cut_bytes", [CUT_BYTES, 4 * ROW_BYTES], ids=["whole", "in two"])
def test_random_orders_agree_with_float64(cluster, world_size, name, flags, cut_bytes):
    """Shares of four rows or more are cut in two, if any are: one program has both kinds."""
    ranks = cluster(world_size)
    enqueue = enqueue_program(ranks, PROGRAMS[name])
    programs = ranks.on_each_rank(enqueue, flags=flags, can_write_fp8=True, cut_bytes=cut_bytes)
    for seed, late_rank in enumerate((None, 0, world_size - 1)):
        for scratch in ranks.scratch:
            assert not scratch[: ranks.layout.count(Channel.IN_LINE)].any()  # flags are cleared
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


@pytest.mark.parametrize(
    ("options", "phase"),
    [({}, "FULL"), ({"cut_bytes": 0}, "PART")],
    ids=["whole", "in two"],
)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("dead_after", [0, 1])
def test_ranks_that_wait_for_a_dead_one_end(
    cluster, monkeypatch, capfd, beside, dead_after, options, phase
):
    """What streams show and the watchdog reads, up to the end of the process."""
    ended = []
    monkeypatch.setattr(watchdog.os, "abort", lambda: ended.append(1))
    ranks = cluster(3)
    weight = torch.ones(16, dtype=torch.bfloat16)

    def enqueue(rank, engine, _):
        slot = SymmetricBuffer(ranks.x[rank]).slot(0, 7)
        for _ in range(dead_after + (rank != 1)):
            engine.allreduce_rmsnorm(slot, None, weight, EPS, beside=beside).wait()

    programs = ranks.on_each_rank(enqueue, deadline_s=0.5, **options)
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
            f"channel {name}, op {dead_after}: a stream has waited 0.5 s for flags {phase}: "
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
        x = bf16(64, 16)
        addresses = group.gather(x.data_ptr())
        layout = Layout(3, 64, 16, torch.bfloat16)
        engine = CopyEngine.create(group, torch.device("cuda", 0), layout, [])
        engine.add_region(Region(group.rank, tuple(addresses), x.nbytes))
        slot = SymmetricBuffer(x).slot(0, 64)
        engine.allreduce_rmsnorm(slot, None, bf16(16), EPS, beside=False)
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
