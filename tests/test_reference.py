"""The reference transport against float64, and its asynchrony."""

from concurrent.futures import Future
from functools import cache

import pytest
import torch
from distributed import run_ranks

from sglang_tokenweave import deadlines
from sglang_tokenweave.agreement import LostRankError
from sglang_tokenweave.reference import ReferenceTransport, _ThreadPending
from sglang_tokenweave.transport import Slot, SymmetricBuffer

HIDDEN = 64
EPS = 1e-5
# (rows, with residual, weight offset): one row, fewer rows than ranks, not divisible, divisible.
CASES = [(1, True, 0.0), (3, True, 0.0), (8, False, 0.0), (37, True, 1.0), (64, True, 0.0)]


def _inputs(case, world_size, dtype):
    rows = CASES[case][0]
    generator = torch.Generator().manual_seed(case)
    partials = torch.randn(world_size, rows, HIDDEN, generator=generator).to(dtype)
    residual = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(HIDDEN, generator=generator).to(dtype)
    return partials, residual, weight


DTYPES = (torch.float32, torch.bfloat16)


@cache
def _results(world_size):
    return run_ranks(_on_rank, world_size, world_size)


def _on_rank(rank, world_size):
    transport = ReferenceTransport.create(torch.device("cpu"))
    answers = {dtype: _answers(rank, world_size, dtype, transport) for dtype in DTYPES}
    transport.close()
    return answers


def _answers(rank, world_size, dtype, transport):
    buffer = transport.allocate(64, HIDDEN, dtype)
    answers = []
    for case, (rows, with_residual, offset) in enumerate(CASES):
        partials, residual, weight = _inputs(case, world_size, dtype)
        slot = buffer.slot(0, rows)
        slot.tensor.copy_(partials[rank])
        shard = residual[slot.owned_rows(rank, world_size)].clone() if with_residual else None
        pending = transport.allreduce_rmsnorm(
            slot, shard, weight, EPS, ctas=2, beside=case % 2 == 0, weight_offset=offset
        )
        pending.wait()
        answers.append((slot.tensor.clone(), shard))
    return answers


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(world_size, dtype):
    ranks = [answers[dtype] for answers in _results(world_size)]
    # One rounding to the output's dtype, after float32 arithmetic over 64 columns.
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 8e-3}
    )
    for case, (_, with_residual, offset) in enumerate(CASES):
        partials, residual, weight = (x.double() for x in _inputs(case, world_size, dtype))
        total = partials.sum(0) + (residual if with_residual else 0)
        expected = (
            total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS) * (offset + weight)
        )
        for rank in range(world_size):
            output, shard = ranks[rank][case]
            assert torch.equal(output, ranks[0][case][0]), "ranks hold different bits"
            torch.testing.assert_close(output.double(), expected, **tolerance)
            if with_residual:
                rows = Slot(output).owned_rows(rank, world_size)
                torch.testing.assert_close(shard.double(), total[rows], **tolerance)


def _quantized(rank, dtype):
    transport = ReferenceTransport.create(torch.device("cpu"))
    slot = transport.allocate(8, HIDDEN, dtype).slot(0, 7)
    out = transport.allocate(8, HIDDEN, torch.float8_e4m3fn).slot(0, 7)
    plain = transport.allocate(8, HIDDEN, dtype).slot(0, 7)
    partials = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    partials[:, 3] = 0  # a row of zeros has the scale 0
    weight = torch.ones(HIDDEN, dtype=dtype)
    for into in (plain, out):
        slot.tensor.copy_(partials[rank])
        arguments = (slot, None, weight, EPS)
        transport.allreduce_rmsnorm(*arguments, ctas=2, beside=True, out=into).wait()
    transport.close()
    return plain.tensor, out.tensor.float(), out.scales


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_can_go_to_another_buffer_and_be_quantized(dtype):
    ranks = run_ranks(_quantized, 2, dtype)
    plain, rows, scales = ranks[0]
    largest = plain.float().abs().amax(-1)
    torch.testing.assert_close(scales, largest / 448)
    assert torch.all(rows[3] == 0)
    # Three bits of fraction: half a unit of them is 1/16; near zero, half of the smallest, 2^-9.
    allowed = (rows.abs() / 16).clamp_min(2.0**-10) * scales[:, None]
    assert torch.all((rows * scales[:, None] - plain.float()).abs() <= allowed * 1.001)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0], ranks[1], strict=True))


def _read_early(rank):
    transport = ReferenceTransport.create(torch.device("cpu"))
    slot = transport.allocate(8, HIDDEN, torch.float32).slot(0, 8)
    slot.tensor.fill_(1.0)
    blocked = transport._worker.submit(__import__("time").sleep, 0.3)
    pending = transport.allreduce_rmsnorm(slot, None, torch.ones(HIDDEN), EPS, ctas=2, beside=True)
    early = slot.tensor.clone()
    assert not blocked.done(), "the op must run behind the caller's back"
    pending.wait()
    late = slot.tensor.clone()
    transport.close()
    return early, late


def test_runs_beside_the_caller():
    for early, late in run_ranks(_read_early, 2):
        assert torch.equal(early, torch.ones(8, HIDDEN))
        torch.testing.assert_close(late, torch.ones(8, HIDDEN))


def _fail_on_rank_one(rank):
    transport = ReferenceTransport.create(torch.device("cpu"))
    slot = transport.allocate(8, HIDDEN, torch.float32).slot(0, 8)
    if rank == 1:
        return "left"
    pending = transport.allreduce_rmsnorm(slot, None, torch.ones(HIDDEN), EPS, ctas=2, beside=True)
    with pytest.raises(LostRankError, match="rank 0 of 2 does not reach all other ranks"):
        pending.wait()
    return "error"


def test_a_rank_that_is_gone_is_an_error_and_no_hang():
    assert run_ranks(_fail_on_rank_one, 2, timeout_s=100) == ["error", "left"]


def _fail_then_go_on(rank):
    transport = ReferenceTransport.create(torch.device("cpu"))
    buffer = transport.allocate(12, HIDDEN, torch.float32)
    weights = (torch.ones(HIDDEN - 1 if rank == 0 else HIDDEN), torch.ones(HIDDEN))
    ops = [
        transport.allreduce_rmsnorm(slot, None, weight, EPS, ctas=2, beside=True)
        for slot, weight in zip((buffer.slot(0, 4), buffer.slot(4, 12)), weights, strict=True)
    ]
    errors = []
    for op in ops:
        with pytest.raises(RuntimeError) as failed:
            op.wait()
        errors.append(str(failed.value))
    return errors


def test_an_op_after_a_failed_one_does_not_run():
    """It would meet the other rank's first op, and exchange rows of other halves."""
    mine, others = run_ranks(_fail_then_go_on, 2, timeout_s=100)
    assert mine[0] == mine[1]
    assert "size of tensor" in mine[0]
    assert all("rank 1 of 2 does not reach all other ranks" in error for error in others)


def test_an_op_that_does_not_end_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(deadlines, "OP_S", 0.1)
    with pytest.raises(RuntimeError, match=r"the op of rank 3 did not end within 0\.1 s"):
        _ThreadPending(Future(), rank=3).wait()


@pytest.mark.parametrize(("rows", "world_size"), [(1, 4), (5, 4), (8, 4), (9, 2), (3, 8)])
def test_every_row_has_one_owner(rows, world_size):
    slot = Slot(torch.zeros(rows, 1))
    owned = [slot.owned_rows(rank, world_size) for rank in range(world_size)]
    assert [row for part in owned for row in range(rows)[part]] == list(range(rows))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 9)])
def test_rows_outside_the_buffer_are_refused(start, stop):
    with pytest.raises(ValueError, match="outside the buffer's 0:8"):
        SymmetricBuffer(torch.zeros(8, 4)).slot(start, stop)
