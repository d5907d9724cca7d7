"""Logs hold what clients sent: the doctor reads any of it, soon, and shows none of it raw."""

import re
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_tokenweave.doctor import logs, report

fuzz = settings(deadline=None, derandomize=True, max_examples=200)
# What the patterns are made of, and lines of our own that are read in part.
pieces = {piece for each in logs.SYMPTOMS for piece in re.findall(r"[\w :=,'(]{2,}", each.pattern)}
waits = st.tuples(*[st.integers(0, 10**9)] * 3).map(
    lambda n: f"tokenweave: rank {n[0]}, CTA {n[1]} waited 7 ms for rank {n[2]}"
)
fragments = st.one_of(
    st.sampled_from([*sorted(pieces), "tokenweave: rank 1", " a stream has waited", "="]),
    waits,
    st.text(max_size=20),
    st.sampled_from(["TokenWeave after 3 batches: prefill off 3", "\x1b[2J", "server_args="]),
)
lines = st.lists(fragments, max_size=6).map("".join)


@given(st.lists(lines, max_size=5))
@example([f"tokenweave: rank 1, CTA {'9' * 4301} waited 3 ms for rank 0"])
@example(["CUDA out of memory \x1b]0;title\x07 \udcff"])
@example(["TokenWeave after 3 batches: off \x1b[31m"])
@fuzz
def test_any_log_is_read_and_shown_in_plain_text(log):
    text = "\n".join(report.log_lines("log", logs.read(log)))
    assert all(line.isprintable() for line in text.split("\n"))


@pytest.mark.timeout(60)  # seconds: each is read in less than one, and was not in hours
@pytest.mark.parametrize(
    "repeated",
    ["A", "=A", "1", "tokenweave: rank 1 ", "rank 1's: ", ", expected ()", "the hook on "],
)
def test_a_long_line_is_read_soon(repeated):
    line = repeated * (1_000_000 // len(repeated))
    assert not [each for each in logs.read([line]) if each.finding.id == "log-multicast-off"]
    logs.read([line + " a stream has waited", line + " first, needed to"])


def test_a_log_on_standard_input_may_be_no_text():
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-m", "sglang_tokenweave.doctor", "--log", "-"],
        input=b"\xff\xfe CUDA out of memory \x1b[31m\n",
        env={"PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        timeout=60,
    )
    assert done.stderr == b""
    assert b"log-out-of-memory" in done.stdout
    assert b"\x1b" not in done.stdout
