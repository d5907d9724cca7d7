"""The soak, shortened: nothing grows; and a leak in made-up figures, and a real one, is seen."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soak
import soak_servers
from server import Server, after_import
from slopes import slope
from soak import Look, Mix, judge
from thorough import rare

HOUR_S = 3600
RATE = 3.0
# In every scheduler and for each request, once the file is there: a descriptor and two MiB.
LEAK = """
import os

_taken = []
_handle = Scheduler.handle_generate_request


def _leak(self, *arguments, **options):
    if os.path.exists({flag!r}):
        _taken.append((os.dup(0), bytearray(b"x" * 2**21)))
    return _handle(self, *arguments, **options)


Scheduler.handle_generate_request = _leak
"""


def looks(seconds: float, **leaks_per_s: float) -> list[Look]:
    """Make up what a run sees: noise of a working server, and leaks."""
    random = np.random.default_rng(0)
    found = []
    for at in np.arange(soak.LOOK_S, seconds, soak.LOOK_S):
        figures = {
            "memory scheduler": 6e8 + 1e6 * random.standard_normal(),
            "descriptors HTTP server": 55 + random.integers(-8, 9),
            "threads scheduler": 61.0,
            "files in /dev/shm": 2.0,
            "requests in flight": random.poisson(5),
            "median latency": random.exponential(0.5),
        }
        for name in figures:
            figures[name] += int(leaks_per_s.get(name.split()[0], 0.0) * at)
        found.append(Look(float(at), int(RATE * at), (), figures))
    return found


def exceeded(seen: list[Look], warm_up_s: float) -> set[str]:
    """Return the first word of the figures that grew too fast."""
    return {each.name.split()[0] for each in judge(seen, warm_up_s) if not each.is_kept}


def test_noise_is_no_leak() -> None:
    assert exceeded(looks(HOUR_S), 600) == set()


@pytest.mark.parametrize(
    ("what", "per_s"),
    [
        ("descriptors", 1 / 60),
        ("threads", 1 / 60),
        ("files", 1 / 60),
        ("requests", 1 / 60),
        ("memory", 8 * 1024 * RATE),
    ],
)
def test_an_hour_shows_a_leak_of_one_a_minute_and_of_some_kib_a_request(what, per_s) -> None:
    assert exceeded(looks(HOUR_S, **{what: per_s}), 600) == {what}


def test_a_slope_has_an_interval() -> None:
    times = np.arange(100.0)
    rising = slope(times, 3 * times + np.random.default_rng(0).standard_normal(100))
    assert rising.low < 3 < rising.high
    assert not rising.is_noise
    assert slope(times, np.ones(100)).is_noise
    with pytest.raises(ValueError, match="needs 8"):
        slope(times[:7], times[:7])


@rare
@pytest.mark.server
def test_a_server_under_load_and_one_that_leaks(model: Callable[[str], Path], tmp_path) -> None:
    flag = tmp_path / "leak"
    code = LEAK.format(flag=str(flag))
    path = [after_import(tmp_path, "sglang.srt.managers.scheduler", code)]
    with Server(model("llama"), flags=soak_servers.FLAGS, pythonpath=path) as server:
        seen: list[Look] = []
        done = asyncio.run(soak.soak(server, Mix(0), RATE, 70, seen.append))
        assert done.errors == []
        assert done.completed > 100
        assert done.left > 0
        # How many are in flight tells of a machine that is busy otherwise, too.
        assert exceeded(seen, warm_up_s=20) <= {"requests"}, seen
        state = server.tokenweave()
        assert state is not None
        assert state["cuts"]["inside"] > 0
        assert not state["fallbacks"]

        flag.touch()
        seen = []
        done = asyncio.run(soak.soak(server, Mix(1), RATE, 45, seen.append))
        assert done.errors == []
        assert {"memory", "descriptors"} <= exceeded(seen, warm_up_s=0), seen


def test_the_report_is_written_while_the_run_goes_on(tmp_path: Path) -> None:
    report = soak.Report(tmp_path / "soak.json", "a command", 60, RATE, warm_up_s=30)
    for look in looks(200):
        report.see(look)
    assert "This run was not over" in report.output.read_text()
    assert len((tmp_path / "soak.csv").read_text().splitlines()) == 1 + len(report.looks)
    assert all(verdict.is_kept for verdict in report.write(["a note"], 0))
    assert "a note" in report.output.read_text()
