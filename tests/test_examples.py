"""Every script of examples/, run as a user runs it, against real servers of the demo model."""

import ast
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from server import Server

from launch.command import DEMO_MODEL, ROOT

pytestmark = pytest.mark.server

EXAMPLES = ROOT / "examples"
FLAGS = (
    *("--tokenweave-strict", "--tokenweave-min-tokens", "16"),
    *("--grammar-backend", "xgrammar", "--constrained-json-disable-any-whitespace"),
)
DEADLINE_S = 240


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(DEMO_MODEL, flags=FLAGS) as running:
        yield running
        state = running.tokenweave()
    assert state is not None
    assert state["tokens"]["prefill"]["weave"] > 0
    assert not state["fallbacks"]


def run_example(name: str, *arguments: str, **variables: str) -> str:
    """Return what an example printed; it must end well and in time."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_every_example_is_listed_and_tested() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    rows = re.findall(r"^\| \[`(\S+)`\]\((\S+)\) \|", (EXAMPLES / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {link for _, link in rows} == scripts
    tested = set(re.findall(r'run_example\(\s*"(\S+?)"', Path(__file__).read_text()))
    assert tested == scripts


def test_chat(server: Server) -> None:
    prompt = "def read_lines(path):\n    "
    printed = run_example("chat.py", "--url", server.url, "--prompt", prompt)
    whole, streamed = re.fullmatch(
        r"--- whole\n(.+)\n--- streamed\n(.+)\n", printed, re.DOTALL
    ).groups()
    assert streamed == whole
    # The chat template adds nothing to one message, so the plain completion is the same.
    plain = server.generate(text=prompt, sampling_params={"temperature": 0, "max_new_tokens": 120})
    assert whole == plain["text"]


def test_structured_output(server: Server) -> None:
    answer = json.loads(run_example("structured_output.py", "--url", server.url))
    sys.path.insert(0, str(EXAMPLES))
    try:
        from structured_output import SCHEMA
    finally:
        sys.path.remove(str(EXAMPLES))
    jsonschema.validate(answer, SCHEMA)
    assert set(answer) == set(SCHEMA["required"])


def test_offline_batch(server: Server) -> None:
    # Not the environment of a test's server: the example sets what a CPU needs by itself.
    printed = run_example("offline_batch.py", "--model", str(DEMO_MODEL))
    *answers, plans = printed[printed.index("--- ") :].removeprefix("--- ").split("\n--- ")
    assert len(answers) == 4
    for answer in answers:
        prompt, _, text = answer.partition("\n")
        expected = server.generate(
            text=ast.literal_eval(prompt), sampling_params={"temperature": 0, "max_new_tokens": 60}
        )
        assert text.rstrip("\n") == expected["text"].rstrip("\n")
    woven = int(re.search(r"'weave': (\d+)", plans).group(1))
    assert woven > 0


def test_router(server: Server) -> None:
    with Server(DEMO_MODEL, flags=FLAGS) as second:
        arguments = ["--url", server.url, "--url", second.url, "--port", free_port()]
        printed = run_example("router.py", *arguments, "--requests", "6")
        texts = re.findall(r"^(\d): (.+)$", printed, re.M)
        shares = dict(re.findall(r"^(http\S+) read (\d+) tokens$", printed, re.M))
        assert [int(number) for number, _ in texts] == list(range(6))
        for number, text in texts:
            expected = second.generate(
                text=f"def function_{number}(self):\n",
                sampling_params={"temperature": 0, "max_new_tokens": 24},
            )
            assert ast.literal_eval(text) == expected["text"]
    assert set(shares) == {server.url, second.url}
    assert all(int(tokens) > 0 for tokens in shares.values()), printed
