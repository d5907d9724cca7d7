"""The watchdog: ends a process whose stream waits for good, and no other one."""

import ctypes
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from streams import Recorder

from sglang_tokenweave import watchdog
from sglang_tokenweave.copy_plan import Channel, Phase
from sglang_tokenweave.watchdog import Board, Stalls, Watchdog

IN_LINE, BESIDE = Channel
PATIENCE_S = 20


@pytest.mark.parametrize(
    ("shown", "late"),
    [
        ([(1, 7)] * 5, True),
        ([(2, 7)] * 5, True),
        ([(0, 7)] * 50, False),
        ([(1, 7)] * 4 + [(2, 7)] * 4 + [(0, 7)] + [(1, 7)] * 4, False),
        # One op after the other, each in its first wait when it is looked at.
        ([(1, count) for count in range(50)], False),
    ],
)
def test_only_one_and_the_same_wait_is_late(shown, late):
    stalls = Stalls(deadline_s=4.0)
    found = [stalls.observe({IN_LINE: (0, 0), BESIDE: each}, 1.0) for each in shown]
    assert found == [None] * (len(shown) - 1) + [BESIDE if late else None]


@pytest.fixture
def board(monkeypatch):
    Recorder().install(monkeypatch)
    made = Board()
    yield made
    made.close()


def show(board, phase, count):
    words = (ctypes.c_uint32 * 2).from_address(board.device_address(BESIDE))
    words[0], words[1] = phase, count


class Ended:
    """Takes the place of the end of the process."""

    def __init__(self):
        self.message = None
        self._event = threading.Event()

    def __call__(self, message):
        self.message = message
        self._event.set()

    def within(self, seconds):
        return self._event.wait(seconds)


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ({1: 0, 3: 5}, "flags DONE: rank 1's: expected 1, seen 0, rank 3's: expected 1, seen 5; "),
        ({}, "flags DONE, which are all set: its own copies hang"),
        (RuntimeError("no answer"), "flags DONE, which cannot be read (no answer)"),
    ],
)
def test_a_message_names_who_waits_for_whom(board, missing, text):
    def read(channel, phase):
        assert (channel, phase) == (BESIDE, Phase.DONE)
        if isinstance(missing, Exception):
            raise missing
        return missing

    ended = Ended()
    show(board, Phase.DONE, 12)
    watching = Watchdog(2, board, read, deadline_s=0.2, end=ended)
    assert ended.within(PATIENCE_S)
    assert "tokenweave: rank 2 (process " in ended.message
    assert "), channel BESIDE, op 12: a stream has waited 0.2 s for " + text in ended.message
    watching.close()


def test_a_busy_process_goes_on(board):
    """Whenever it looks, a wait is under way, but each time another one."""
    ended = Ended()
    watching = Watchdog(0, board, lambda *_: {}, deadline_s=0.3, end=ended)
    end = time.monotonic() + 1.5
    count = 0
    while time.monotonic() < end:
        count += 1
        show(board, Phase.FULL, count)
        time.sleep(0.001)
    assert not ended.within(0)
    watching.close()


def test_time_in_which_the_process_stood_still_does_not_count(board, monkeypatch):
    """By the clock, 1000 s pass between two looks: no more than two polls count."""
    ended, looks, now = Ended(), [], iter(range(0, 10**6, 1000))
    show(board, Phase.FULL, 1)
    shown = board.shown
    monkeypatch.setattr(board, "shown", lambda: looks.append(1) or shown())
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: next(now)))
    watching = Watchdog(0, board, lambda *_: {}, deadline_s=0.5, end=ended)
    assert ended.within(PATIENCE_S)
    assert len(looks) == 6  # the first one is not one again; then 0.5 s of 0.1 s each
    watching.close()


def test_a_closed_watchdog_does_not_bark(board):
    ended = Ended()
    Watchdog(0, board, lambda *_: {}, deadline_s=0.2, end=ended).close()
    show(board, Phase.FULL, 1)
    assert not ended.within(0.5)


CODE = """
import ctypes, sys, time, faulthandler
from types import SimpleNamespace
sys.path.insert(0, "tests")
from sglang_tokenweave import driver
from streams import Recorder
recorder = Recorder()
driver.bindings = lambda: recorder
from sglang_tokenweave.copy_plan import Phase
from sglang_tokenweave.watchdog import Board, Watchdog
faulthandler.enable()
board = Board()
ctypes.c_uint32.from_address(board.device_address(0)).value = Phase.FULL
Watchdog(0, board, lambda *_: {1: 0}, deadline_s=0.2)
time.sleep(60)
"""


def test_a_process_ends_by_a_signal_as_a_launcher_expects():
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -6
    assert "for flags FULL: rank 1's: expected 1, seen 0; " in done.stderr
    assert "Fatal Python error: Aborted" in done.stderr
