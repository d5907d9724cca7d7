"""Processes that do something at the same moment."""

import subprocess
import time
from collections.abc import Sequence


def race(
    racers: Sequence["subprocess.Popen[str]"], timeout_s: float
) -> tuple[list[tuple[str, str]], float]:
    """Let processes go together once all have said "ready"; all end with status 0.

    Each prints that line and reads one. Returned is what each wrote, to both outputs, and how many
    seconds all took.
    """
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n", racer.communicate()[1]
        start = time.monotonic()
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        results = [racer.communicate(timeout=timeout_s) for racer in racers]
        seconds = time.monotonic() - start
    finally:
        for racer in racers:
            racer.kill()
    assert [racer.returncode for racer in racers] == [0] * len(racers), results
    return results, seconds
