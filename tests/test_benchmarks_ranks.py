"""The benchmarks' processes, and one size measured end to end on CPU ranks."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import switches, worker
from benchmarks.cases import Case
from benchmarks.ours import OURS
from benchmarks.ranks import RankError, run_ranks
from benchmarks.variant import EPS, Absent, Buffer, Output, Variant
from benchmarks.workbench import Place, Workbench
from benchmarks.worker import Options, Size
from sglang_tokenweave.reference import ReferenceTransport

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60  # for what must succeed, on two busy cores
CASE = Case(64, "bf16", 5)


def _run(function, *arguments):
    return list(run_ranks(function, 2, *arguments, deadline_s=PATIENCE_S))


def _gone(process, within_s=10.0):
    """Return whether a process ends, or is only an entry that nobody has collected."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def _misbehave(rank, link, how, folder):
    child = subprocess.Popen(["sleep", "300"])  # like a compiler
    (Path(folder) / f"{rank}").write_text(f"{os.getpid()} {child.pid}")
    dist.barrier()
    link.phase("misbehaving", 2 if how == "hangs" else None)
    if rank == 1 and how == "raises":
        raise ValueError("of all things")
    if rank == 1 and how == "dies":
        os._exit(7)
    dist.barrier()  # the other rank waits for good
    time.sleep(300)


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("raises", r"rank 1 failed in 'misbehaving':\n(?s:.*)ValueError: of all thi"),
        ("dies", "rank 1 died in 'misbehaving' with exit code 7"),
        ("hangs", r"rank \d did not finish 'misbehaving' within 2 s"),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_name(how, wanted, tmp_path):
    with pytest.raises(RankError, match=wanted):  # if first or not: rank 0 loses its peer
        _run(_misbehave, how, str(tmp_path))
    processes = " ".join(path.read_text() for path in tmp_path.iterdir()).split()
    assert len(processes) == 4
    assert all(_gone(process) for process in processes)


_PARENT = """
import sys
sys.path[:0] = {paths!r}
from benchmarks.ranks import run_ranks
from test_benchmarks_ranks import _misbehave
if __name__ == "__main__":
    list(run_ranks(_misbehave, 2, "hangs", {folder!r}, deadline_s=300))
"""


def test_ranks_do_not_outlive_the_process_that_started_them(tmp_path):
    script = tmp_path / "parent.py"
    paths = [str(ROOT), str(ROOT / "tests")]
    (tmp_path / "processes").mkdir()
    script.write_text(_PARENT.format(paths=paths, folder=str(tmp_path / "processes")))
    parent = subprocess.Popen([sys.executable, str(script)], cwd=ROOT)
    try:
        end = time.monotonic() + PATIENCE_S
        while len(list((tmp_path / "processes").iterdir())) < 2:
            assert time.monotonic() < end
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    told = [path.read_text().split() for path in (tmp_path / "processes").iterdir()]
    try:
        assert all(_gone(rank) for rank, _ in told)
    finally:
        for _, child in told:
            os.kill(int(child), 9)


class _Gloo(Variant):
    """The op on a CPU, right or wrong in one of several ways."""

    def __init__(self, bench, name, fault=None):
        self.name, self.bench, self.fault = name, bench, fault
        self.roundings = bench.place.world_size + 1
        self.calls = 0
        if fault == "cannot" and bench.place.rank == 1:
            raise KeyError("only on rank 1")

    def refuses(self, case):
        return "too many tokens" if self.fault == "small" and case.tokens > 2 else None

    def buffers(self, case, count):
        place, shares = self.bench.place, []
        for buffer in self.bench.split(self.bench.x, case, count, norm=True):
            share = -(-case.tokens // place.world_size)
            rows = slice(place.rank * share, (place.rank + 1) * share)
            shares.append(Buffer(buffer.x, buffer.residual[rows], rows.start))
        return shares

    def close(self):
        self.bench.place.meet()

    def run(self, buffer):
        self.calls += 1
        dist.all_reduce(buffer.x)
        residual = torch.zeros_like(buffer.x)
        last = buffer.first_row + buffer.residual.shape[0]
        residual[buffer.first_row : last] = buffer.residual
        dist.all_reduce(residual)  # each rank holds its rows only
        total = (buffer.x + residual).float()
        scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
        buffer.x.copy_(total * scale * self.bench.weight)
        buffer.residual.copy_(total[buffer.first_row : last])
        if self.fault == "wrong" or (self.fault == "tires" and self.calls > 3):
            buffer.x[1, 3] += 0.5
        if self.fault == "residual" and self.bench.place.rank == 1:
            buffer.residual[0] *= 1.1
        if self.fault == "nan" and self.bench.place.rank == 0:
            buffer.x[0, 0] = float("nan")
        return Output(buffer.x, buffer.residual)


class _Copies:
    bytes = 4000

    def run(self, index):
        pass


def _timer(call, calls, around):
    """Time nothing, but call: rank r takes r + 1 microseconds."""
    with around:
        for index in range(calls):
            call(index)
    return lambda: float(dist.get_rank() + 1)


FAULTS = {
    "nccl+norm": None,
    "two_shot+norm": "wrong",
    "one_shot+norm": "residual",
    "flashinfer": "cannot",
    "flashinfer/oneshot": "small",
    "sglang_v2+norm": "nan",
    "fused/2": "tires",
}


def _work(rank, link):
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    parts = {"size": _size, "grid": _grid, "slow": _slow, "ours": _ours, "smoke": _smoke}
    link.send({"process": os.getpid()} | {name: part(rank, link) for name, part in parts.items()})


def _variants(faults):
    return {
        name: lambda bench, name, fault=fault: _Gloo(bench, name, fault)
        for name, fault in faults.items()
    }


class _Reports:
    """A link that keeps what rank 0 would send."""

    def __init__(self):
        self.rows, self.absent = [], {}

    def phase(self, name, deadline_s=None):
        pass

    def send(self, report):
        self.rows += report.rows
        self.absent |= report.absent


def _run_cases(rank, cases, names, cache_bytes, seconds):
    place = Place(rank, dist.get_world_size(), torch.device("cpu"))
    options = Options(cases, names, 7, 1, cache_bytes, time.monotonic() + seconds)
    reports = _Reports()
    worker.run_cases(place, reports, options, [("floor/1", _Copies())], _timer)
    return reports.rows, reports.absent


def _size(rank, link):
    worker.VARIANTS = _variants(FAULTS)
    return _run_cases(rank, (CASE,), tuple(FAULTS), 2 * CASE.bytes, PATIENCE_S)  # two buffers


def _grid(rank, link):
    """Measure two shapes, once in time and once too late."""
    worker.VARIANTS = _variants({"nccl+norm": None, "flashinfer": "small"})
    cases = tuple(Case(hidden, "bf16", tokens) for hidden in (8, 16) for tokens in (1, 2, 3, 4))
    return [_run_cases(rank, cases, tuple(worker.VARIANTS), 1, seconds) for seconds in (60, 0)]


def _slow(rank, link):
    """Measure a variant that is built for longer than the time that is given."""

    def build(bench, name):
        time.sleep(3)
        return _Gloo(bench, name)

    worker.VARIANTS = {"flashinfer": build}
    return _run_cases(rank, (CASE,), ("flashinfer",), 2 * CASE.bytes, seconds=2.5)


def _ours(rank, link):
    """Measure our variants over the transport that runs on a CPU, which has no copy engines."""
    place = Place(rank, dist.get_world_size(), torch.device("cpu"))
    bench = Workbench(place, CASE.hidden, torch.bfloat16, CASE.tokens, 3 * CASE.tokens)
    transport = ReferenceTransport(place.group, place.device)
    bench.transport = transport, transport.allocate(bench.capacity, bench.hidden, bench.dtype)
    worker.VARIANTS = OURS
    os.environ |= switches.SWITCHES
    names = ("fused/2", "fused/8", "multicast/8", "copy_engine")
    options = Options((CASE,), names, 2, 1, 3 * CASE.bytes, time.monotonic() + PATIENCE_S)
    variants, absent = worker._make(bench, names, link, CASE.shape)
    report = Size(bench, CASE, options, link, _timer).run(variants, [("floor/1", _Copies())])
    transport.close()
    return [row.variant for row in report.rows], {**absent, **report.absent}


def _smoke(rank, link):
    """Ask for what may not start: multicast, and NCCL where ranks share a GPU."""
    place = Place(rank, dist.get_world_size(), torch.device("cpu"), ranks_per_gpu=2)
    os.environ |= switches.SWITCHES

    class Multicast(_Gloo):
        uses_multicast = True

    worker.VARIANTS = {"multicast/8": Multicast, "nccl": lambda bench, _: bench.place.nccl}
    bench = Workbench(place, 8, torch.bfloat16, 1, 1)
    _, absent = worker._make(bench, tuple(worker.VARIANTS), link, "s")
    with pytest.raises(Absent, match="refuses ranks that share a GPU"):
        _ = bench.symmetric_x
    return absent, place.left(time.monotonic() + 100 * (rank + 1))


@pytest.fixture(scope="module")
def told():
    """Return what each of two ranks found, in rank order."""
    return [message for _, message in sorted(_run(_work), key=lambda each: each[0])]


def test_ranks_end_when_they_are_done(told):
    assert len(told) == 2
    assert all(_gone(each["process"]) for each in told)


def test_a_size_is_checked_timed_and_reported(told):
    rows, absent = told[0]["size"]
    assert told[1]["size"] == ([], {})  # rank 0 speaks for all
    times = {row.variant: (row.time_us, row.spread_us) for row in rows}
    # 2 us is the slowest rank's; the floor's rate is 4000 bytes in 2 us, and S is 640 bytes.
    assert times == {"floor": (pytest.approx(0.32), 0.0), "nccl+norm": (2.0, 0.0)}
    assert {row.shape for row in rows} == {"h64-bf16"}
    assert 0 < rows[1].extra["relative_error"] < 4e-3
    at = "at h64-bf16, 5 tokens"
    wrong = [f"{name} {at}" for name in ("two_shot+norm", "one_shot+norm", "sglang_v2+norm")]
    tires = f"fused/2 {at}"
    assert set(absent) == {
        *wrong,
        tires,
        "flashinfer at h64-bf16",
        "flashinfer/oneshot at h64-bf16 from 5 tokens",
    }
    assert absent["flashinfer at h64-bf16"] == "rank 1: KeyError: 'only on rank 1'"
    for name in (*wrong, tires):
        assert re.match(r"wrong result: relative error \[.*\] by rank", absent[name])
    assert "nan" in absent[wrong[2]]
    assert absent[tires].endswith("after it was timed")


def test_all_sizes_of_all_shapes_are_reported_or_named(told):
    (rows, absent), (late_rows, late) = told[0]["grid"]
    measured = [(row.shape, row.tokens) for row in rows if row.variant == "nccl+norm"]
    shapes = [f"h{hidden}-bf16" for hidden in (8, 16)]
    assert measured == [(shape, tokens) for shape in shapes for tokens in (1, 2, 3, 4)]
    small = [(row.shape, row.tokens) for row in rows if row.variant == "flashinfer"]
    assert small == [(shape, tokens) for shape in shapes for tokens in (1, 2)]
    assert absent == {f"flashinfer at {shape} from 3 tokens": "too many tokens" for shape in shapes}
    assert late_rows == []
    assert late == {
        f"{shape}, {tokens} tokens": "the time was up"
        for shape in shapes
        for tokens in (1, 2, 3, 4)
    }


def test_kernels_that_a_rival_compiles_take_nothing_of_the_time(told):
    rows, absent = told[0]["slow"]
    assert [row.variant for row in rows] == ["floor", "flashinfer"]
    assert absent == {}


def test_our_variants_call_the_transport_rightly(told):
    for each in told:
        variants, absent = each["ours"]
        assert variants == ["floor", "fused/2", "fused/8"]
        assert set(absent) == {"copy_engine at h64-bf16", "multicast/8 at h64-bf16"}
        assert "MulticastForbiddenError" in absent["multicast/8 at h64-bf16"]


def test_multicast_is_not_started_and_ranks_go_by_one_clock(told):
    (absent, left), (_, other) = (each["smoke"] for each in told)
    assert left == other
    assert 0 < left <= 100
    assert re.search(
        r"MulticastForbiddenError: multicast/8 uses NVLink multicast, which NCCL_NVLS_ENABLE=0",
        absent["multicast/8 at s"],
    )
    assert "share a GPU" in absent["nccl at s"]
