"""What an operator sees: metrics, /server_info, a line in the log now and then, and --help."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import workloads
from server import LAUNCHERS, Server, environment

from sglang_tokenweave import __version__
from sglang_tokenweave.config import TokenWeaveConfig, flag

pytestmark = pytest.mark.server

LOG_INTERVAL = 5
FLAGS = (
    *("--tokenweave-strict", "--tokenweave-transport", "reference"),
    *("--tokenweave-min-tokens", "64", "--tokenweave-fuse-min-tokens", "8"),
    *("--tokenweave-decode-min-tokens", "4", "--tokenweave-log-interval", str(LOG_INTERVAL)),
    "--enable-metrics",
)


@pytest.fixture(scope="module")
def server(model: Callable[[str], Path]) -> Iterator[Server]:
    with Server(model("llama"), launcher="sglang", flags=FLAGS) as running:
        for workload in ("long_prompt", "short_batch", "decode"):
            workloads.run(running, workload)
        running.flush_cache()  # which waits until it is idle
        yield running


def test_server_info_says_what_is_active(server: Server) -> None:
    state = _state(server)
    assert state["active"]
    assert state["reasons"] == []
    assert state["version"] == __version__
    assert state["model"] == "LlamaForCausalLM"
    assert state["tp_size"] == 2
    assert state["transport"] == "reference"
    given = {"enabled": True, "strict": True, "min_tokens": 64, "fuse_min_tokens": 8}
    assert given.items() <= state["config"].items()


def test_counts_are_those_of_the_requests(server: Server) -> None:
    state = _state(server)
    prefill, decode = state["tokens"]["prefill"], state["tokens"]["decode"]
    # Of /server_info: two prompts of 480 tokens are woven; a decode batch is 1 or up to 24 tokens.
    assert prefill["weave"] >= 2 * 480
    assert decode["weave"] > 0
    assert decode["off"] > 0
    assert state["cuts"]["inside"] >= 2
    woven = sum(modes["weave"] for modes in state["batches"].values())
    assert sum(state["cuts"].values()) == woven
    asked = 2 * 480 + sum(5 + seed % 17 for seed in range(100, 124)) + 12 * 9
    # More by what SGLang and the harness ask of a starting server.
    assert asked <= sum(prefill.values()) < asked + 100


def test_metrics_are_those_of_server_info(server: Server) -> None:
    metrics, state = _metrics(server), _state(server)
    for name, labels in (("batches", ("mode", "plan")), ("tokens", ("mode", "plan"))):
        found = {key: value for key, value in metrics[name].items() if value}
        expected = {
            (mode, plan): count
            for mode, plans in state[name].items()
            for plan, count in plans.items()
            if count
        }
        assert _by(found, labels) == expected
    assert _by(metrics["cuts"], ("position",)) == {
        (position,): count for position, count in state["cuts"].items() if count
    }
    assert not metrics.get("fallbacks")


def test_log_has_a_line_every_few_batches(server: Server) -> None:
    lines = re.findall(r"TokenWeave after (\d+) batches", server.log())
    counts = [int(count) for count in lines]
    assert len(counts) > 3
    assert all(b - a == LOG_INTERVAL for a, b in pairwise(counts)), counts
    assert "Traceback" not in server.log()


# Not `sglang serve --help`, which answers before it loads plugins.
@pytest.mark.parametrize("launcher", ["tokenweave", "sglang"])
def test_help_shows_our_flags(launcher: str) -> None:
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "--help"],
        env=environment(2),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    missing = [
        flag(option.name)
        for option in fields(TokenWeaveConfig)
        if flag(option.name) not in done.stdout
    ]
    assert missing == []


def _state(server: Server) -> dict[str, Any]:
    state = server.tokenweave()
    assert state is not None
    return state


def _metrics(server: Server) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Return our counters: name to labels to value."""
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    pattern = re.compile(r"^sglang:tokenweave_(\w+)_total\{(.*)\} (\S+)$", re.MULTILINE)
    for name, labels, value in pattern.findall(server.request("/metrics").text):
        pairs = re.findall(r'(\w+)="([^"]*)"', labels)
        found.setdefault(name, {})[frozenset(pairs)] = float(value)
    return found


def _by(counts: Any, labels: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    by = {}
    for pairs, value in counts.items():
        given = dict(pairs)
        by[tuple(given[label] for label in labels)] = value
    assert len(by) == len(counts), "two series with the same labels of ours"
    return by
