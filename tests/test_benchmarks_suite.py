"""One command for all benchmarks: what it runs, what it reports, and what it leaves behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import decode, op, prefill, serving, suite

ROOT = Path(__file__).resolve().parents[1]
PARSERS = {
    "benchmarks.op": op._parser,
    "benchmarks.prefill": prefill.parser,
    "benchmarks.decode": decode.parser,
    "benchmarks.serving": serving.parser,
}


@dataclass(frozen=True)
class Fake:
    """A job of a few lines of Python."""

    name: str
    code: str
    minutes: float = 1

    def command(self, folder, tp, commit):
        return [sys.executable, "-c", self.code, str(folder)]


@pytest.mark.parametrize("job", [*suite.JOBS, suite.SMOKE], ids=lambda job: job.name)
def test_every_job_is_a_command_that_its_benchmark_takes(job, tmp_path):
    command = job.command(tmp_path, 4, "0123456")
    assert command[:3] == [sys.executable, "-m", job.module]
    options = PARSERS[job.module]().parse_args(command[3:])
    assert options.output == tmp_path / f"{job.name}.json"
    assert options.commit == "0123456"
    assert (options.tp if job.is_of_servers else options.world_size) == 4


def test_one_that_fails_or_hangs_does_not_keep_the_others_from_running(tmp_path):
    said = []
    jobs = [
        Fake("broken", "print('what went wrong'); raise SystemExit(3)"),
        Fake("endless", "import time; time.sleep(1000)", minutes=1 / 60),
        Fake("good", "import sys, pathlib; pathlib.Path(sys.argv[1], 'done').touch()"),
    ]
    failed = suite.run(jobs, tmp_path, 2, None, said.append)
    assert failed == {"broken": "ended with exit code 3", "endless": "did not end within 1 s"}
    assert (tmp_path / "broken.log").read_text() == "what went wrong\n"
    assert (tmp_path / "done").exists()
    assert said[-1].startswith("good: done after ")


def test_unknown_jobs_are_named(capsys):
    with pytest.raises(SystemExit):
        suite.main(["--jobs", "op,everything"])
    assert "'everything'; known: op, prefill-tp8rank" in capsys.readouterr().err


@pytest.mark.server
def test_it_tries_itself_on_a_cpu_and_draws(tmp_path):
    command = [sys.executable, "-m", "benchmarks.suite", "--cpu", "--tp", "1"]
    done = subprocess.run(
        [*command, "--commit", "0123456", "--output", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (tmp_path / "prefill-smoke.log").read_text()
    assert "prefill-smoke: done after" in done.stdout
    assert "SMOKE TEST" in done.stdout  # the table


def test_a_signal_ends_the_job_that_runs(tmp_path):
    code = (
        "import sys; from pathlib import Path; from benchmarks import suite; "
        f"sys.path.insert(0, {str(ROOT / 'tests')!r}); from test_benchmarks_suite import Fake; "
        "suite.JOBS = (Fake('endless', 'import os, pathlib, sys, time; "
        "pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(1000)'),); "
        f"sys.exit(suite.main(['--output', {str(tmp_path)!r}]))"
    )
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 120
        while not (found := [path.name for path in tmp_path.iterdir() if path.suffix != ".log"]):
            assert time.monotonic() < end
            time.sleep(0.1)
        running.terminate()
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 128 + signal.SIGTERM
    assert b"stopped by SIGTERM" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(found[0]), 0)
