"""The op benchmark on real GPUs: that everything runs and is right, never how long it takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import switches
from benchmarks.schema import load

ROOT = Path(__file__).resolve().parent.parent
OURS = ["fused/2", "fused/16"]

pytestmark = pytest.mark.gpu


def _run(path, *arguments):
    command = [sys.executable, "-m", "benchmarks.op", "--output", str(path), "--commit", "0000000"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return load(path), done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_ranks_on_one_gpu_prove_the_program_and_no_more(tmp_path):
    result, text = _run(
        tmp_path / "op.json",
        *("--ranks-per-gpu", "2", "--world-size", "2", "--hidden", "1024", "--tokens", "1,7"),
        *("--variants", ",".join([*OURS, "nccl", "two_shot"]), "--seconds", "400"),
    )
    assert result.meta.smoke
    assert "SMOKE TEST" in text
    rows = [(row.tokens, row.variant) for row in result.rows]
    assert rows == [(tokens, name) for tokens in (1, 7) for name in ("floor", *OURS)]
    assert set(result.meta.absent) == {"nccl at h1024-bf16", "two_shot at h1024-bf16"}
    assert all("share a GPU" in reason for reason in result.meta.absent.values())


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs with peer access")
def test_ours_and_torchs_on_two_gpus(tmp_path, monkeypatch):
    for name, value in switches.SWITCHES.items():
        monkeypatch.setenv(name, value)
    names = ["nccl", "two_shot", *OURS]
    result, _ = _run(
        tmp_path / "op.json",
        *("--world-size", "2", "--hidden", "8192", "--tokens", "1,1024,4096"),
        *("--variants", ",".join(names), "--seconds", "300"),
    )
    rows = [(row.tokens, row.variant) for row in result.rows]
    assert rows == [(tokens, name) for tokens in (1, 1024, 4096) for name in ("floor", *names)]
    assert result.meta.absent == {}
    assert result.meta.multicast
