"""The flags' kernel on a CPU: it orders what its ranks write, clears its flags, and gives up."""

import shutil
import subprocess

import pytest
from host_build import build_host

NOBODY = 99


def run(program, *arguments):
    command = [*program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer needs a fixed memory layout: allow `setarch -R`")
    return done


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Return the command of a build in which a report of a data race is a failure."""
    folder = tmp_path_factory.mktemp("flags")
    program = build_host(folder, "exchange_flags.cpp", [], "-g", "-fsanitize=thread")
    fixed = ("setarch", "-R")
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], check=False).returncode:
        fixed = ()
    return [*fixed, program]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_only_the_flags_order_the_ranks(sanitized, num_ranks):
    done = run(sanitized, num_ranks, 6, NOBODY, 0, 20_000)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "0\n"


@pytest.mark.parametrize("made", [0, 2])
def test_a_dead_rank_is_named_by_all_others(tmp_path, made):
    # Not sanitized: the shim takes a trapped block's threads apart wherever they are.
    done = run([build_host(tmp_path, "exchange_flags.cpp", [])], 4, 5, 2, made, 1000)
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines()) == [
        f"tokenweave: rank {rank}, channel 0 waited 1000 ms for rank 2's flag of phase 1: "
        "expected 1, seen 0"
        for rank in (0, 1, 3)
    ]
