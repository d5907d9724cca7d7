"""The self-test of the op: here over torch.distributed on a CPU, right, wrong, dying, hanging."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from living import is_running
from machines import cuda_of, facts, nvml_of

from sglang_tokenweave.doctor import forms, selftest
from sglang_tokenweave.doctor.findings import finding
from sglang_tokenweave.doctor.ranks import RankError, run_ranks
from sglang_tokenweave.doctor.selftest_rank import CASES, TIMED_TOKENS, Outcome, Timings
from sglang_tokenweave.reference import ReferenceTransport

SWITCHES = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")
UNICAST = forms.FORMS["peer"].traffic


@pytest.fixture(autouse=True)
def no_switches(monkeypatch):
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)


class Wrong(ReferenceTransport):
    """Adds to rank 1's results, and writes into rows that belong to somebody else."""

    def allreduce_rmsnorm(self, slot, *arguments, **options):
        pending = super().allreduce_rmsnorm(slot, *arguments, **options)
        pending.wait()
        if self.rank == 1:
            slot.tensor.mul_(1.1)
            beyond = slot.tensor.untyped_storage()
            whole = torch.empty(0, dtype=slot.tensor.dtype).set_(beyond)
            whole[slot.tensor.numel()] = 0
        return pending


def test_a_right_transport_passes():
    result = selftest.run_op(forms.Form(ReferenceTransport, UNICAST), "reference", ["cpu"] * 2, 64)
    assert result.passed, result.findings
    passed, shared = result.findings
    assert passed.id == "selftest-passed"
    assert f"reference on 2 ranks: {len(CASES)} cases, error " in passed.text
    assert shared.id == "selftest-one-gpu"
    assert "no link was measured" in shared.text


def test_a_wrong_transport_does_not_pass():
    result = selftest.run_op(forms.Form(Wrong, UNICAST), "reference", ["cpu"] * 2, 64)
    assert not result.passed
    (wrong,) = result.findings
    assert wrong.id == "selftest-wrong"
    assert "1 tokens: relative error 1.0e-01, 4e-03 is allowed" in wrong.text
    assert "1031 tokens: the ranks hold different bits" in wrong.text
    assert "rows of another batch were overwritten" in wrong.text


@dataclass(frozen=True)
class Absent:
    """A transport whose rank 1 ends before it is made, while rank 0 waits."""

    folder: str

    def __call__(self, group, device):
        Path(self.folder, str(os.getpid())).touch()
        if torch.distributed.get_rank(group) == 1:
            os._exit(3)
        time.sleep(600)


def test_a_rank_that_dies_is_named_and_the_other_one_ended(tmp_path):
    form = forms.Form(Absent(str(tmp_path)), UNICAST)
    result = selftest.run_op(form, "reference", ["cpu"] * 2, 64)
    assert not result.passed
    (failed,) = result.findings
    assert (failed.id, failed.text) == ("selftest-failed", "rank 1 died, exit code 3")
    assert_gone(tmp_path)


def hang(rank, group, folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


def test_the_deadline_holds(tmp_path):
    with pytest.raises(RankError, match=r"rank\(s\) \[0\] gave no answer in 1 s"):
        run_ranks(hang, 1, str(tmp_path), deadline_s=1)
    assert not multiprocessing.active_children()


def test_ranks_end_with_a_doctor_that_is_killed(tmp_path):
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    script = tmp_path / "doctor.py"
    script.write_text(
        "import test_doctor_op as test\n"
        "if __name__ == '__main__':\n"
        f"    test.run_ranks(test.hang, 1, {str(ranks)!r}, deadline_s=300)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    doctor = subprocess.Popen([sys.executable, script], env=environment)
    deadline = time.monotonic() + 60
    while not list(ranks.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    doctor.send_signal(signal.SIGKILL)
    doctor.wait(10)
    assert_gone(ranks)


def assert_gone(folder):
    pids = [int(path.name) for path in folder.iterdir()]
    assert pids
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def ran(monkeypatch, machine, findings=()):
    """Return the devices on which the self-test would run on a machine, or its result."""
    monkeypatch.setattr(selftest, "run_op", lambda form, transport, devices: devices)
    return selftest.run("peer", machine, findings)


def test_which_gpus_are_used(monkeypatch):
    assert ran(monkeypatch, facts()) == ["cuda:0", "cuda:1"]
    five = facts(cuda=cuda_of(5), nvml=nvml_of(5))
    assert ran(monkeypatch, five) == [f"cuda:{rank}" for rank in range(4)]
    assert ran(monkeypatch, facts(cuda=cuda_of(1))) == ["cuda:0", "cuda:0"]


def test_what_was_not_run_is_said(monkeypatch):
    result = ran(monkeypatch, facts(), [finding("no-gpu", "no NVIDIA GPU")])
    assert not result.passed
    assert result.findings[0].id == "selftest-not-run"
    assert "no NVIDIA GPU" in result.findings[0].text
    harmless = [finding("plugin-not-loaded", ""), finding("sglang-missing", "")]
    assert ran(monkeypatch, facts(), harmless) == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(("op_us", "ids"), [(450.0, 1), (1000.0, 2)])
def test_speed_is_a_share_of_the_link(monkeypatch, op_us, ids):
    good = tuple(Outcome(case, 1e-3, True, "same") for case in CASES)
    reports = [(good, Timings(340.0, (60.0, op_us)))] * 2
    monkeypatch.setattr("sglang_tokenweave.doctor.ranks.run_ranks", lambda *a, **k: reports)
    result = selftest.run_op(forms.FORMS["peer"], "peer", ["cuda:0", "cuda:1"])
    assert result.passed
    assert [found.id for found in result.findings] == ["selftest-passed", "selftest-slow"][:ids]
    small, large = result.measured
    assert (small["num_tokens"], large["num_tokens"]) == TIMED_TOKENS
    # Two ranks send all of their activations once: half to be reduced, half as results.
    assert large["gb_per_s"] == pytest.approx(8192 * 8192 * 2 / op_us / 1e3)
    assert large["share_of_link"] == pytest.approx(large["gb_per_s"] / 340)


@pytest.mark.parametrize("name", SWITCHES)
def test_multicast_is_refused_by_the_switch_s_name_before_anything(monkeypatch, name):
    value = "0" if name == "NCCL_NVLS_ENABLE" else "1"
    monkeypatch.setenv(name, value)
    result = selftest.refuse_multicast()
    assert not result.passed
    assert result.findings[0].id == "selftest-refused"
    assert f"{name}={value}" in result.findings[0].text
    with pytest.raises(RuntimeError, match=name):  # and once more where it would be made
        forms.make_multicast(None, None)


def test_multicast_is_run_where_no_switch_forbids_it(monkeypatch):
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    assert selftest.refuse_multicast() is None
