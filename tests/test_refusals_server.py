"""What is not woven runs stock and says why, or, strictly, does not run; bad flags stop at once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import workloads
from server import Server
from thorough import THOROUGH, rare

pytestmark = pytest.mark.server


@dataclass(frozen=True)
class Case:
    """A server that cannot be woven, and what it must say."""

    reason: str
    flags: tuple[str, ...] = ()
    architecture: str = "llama"
    tp: int = 2


GEMMA = Case("architecture Gemma2ForCausalLM is not supported", architecture="gemma2")
ONE_RANK = Case("tensor parallel size is 1", tp=1)
LORA = Case(
    "not supported with LoRA",
    ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj", "o_proj"),
)
DP_ATTENTION = Case(
    "not supported with data-parallel attention", ("--enable-dp-attention", "--dp-size", "2")
)

# One rank, not strict: tests/test_equality.py. With LoRA or data-parallel attention SGLang does not
# serve on a CPU at all, but a strict server is refused before that shows.
RUN_STOCK = {"gemma2": GEMMA}
STOP = {
    "one-rank": ONE_RANK,
    "lora": LORA,
    "dp-attention": DP_ATTENTION,
}


@pytest.mark.parametrize("case", RUN_STOCK.values(), ids=RUN_STOCK.keys())
def test_runs_stock_and_says_why(case: Case, model: Callable[[str], Path]) -> None:
    with _server(case, model, "--tokenweave-min-tokens", "4") as server:
        state = server.tokenweave()
        assert state is not None
        assert not state["active"]
        assert any(case.reason in reason for reason in state["reasons"]), state["reasons"]
        answers = workloads.run(server, "short_batch")
        assert all(len(answer.tokens) == 16 for answer in answers)
        lines = [line for line in server.log().splitlines() if "TokenWeave" in line]
    said = [line for line in lines if "NOT active" in line and case.reason in line]
    assert len(said) == 1, lines  # and not one from each rank


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[rare] if case.flags else [])  # tests/test_refusals.py
        for name, case in STOP.items()
    ],
)
def test_stops_if_strict(case: Case, model: Callable[[str], Path]) -> None:
    server = _server(case, model, "--tokenweave-strict")
    server.launch()
    status = server.wait_until_ended(150)
    assert status != 0, server.text
    assert "TokenWeave is strict" in server.text
    assert case.reason in server.text
    assert "ready to roll" not in server.text


BAD_FLAGS = {
    "unknown": ("tokenweave", ("--tokenweave-foo", "3"), ("--tokenweave-foo",)),
    "unknown-stock-launcher": ("sglang", ("--tokenweave-foo", "3"), ("--tokenweave-foo",)),
    "not-switched-on": (
        "off",
        ("--tokenweave-min-tokens", "64"),
        ("--tokenweave-min-tokens", "--enable-tokenweave"),
    ),
    "not-a-number": (
        "tokenweave",
        ("--tokenweave-min-tokens", "many"),
        ("--tokenweave-min-tokens", "many"),
    ),
    "negative": (
        "tokenweave",
        ("--tokenweave-min-tokens", "-3"),
        ("--tokenweave-min-tokens", "-3"),
    ),
    "one-request": (
        "tokenweave",
        ("--tokenweave-decode-min-tokens", "1"),
        ("--tokenweave-decode-min-tokens",),
    ),
    "ray": ("tokenweave", ("--use-ray", "--tokenweave-strict"), ("strict", "Ray (--use-ray)")),
    "unknown-transport": (
        "tokenweave",
        ("--tokenweave-transport", "pigeon"),
        ("--tokenweave-transport", "pigeon", "reference"),
    ),
    "contradiction": (
        "tokenweave",
        ("--tokenweave-min-tokens", "64", "--tokenweave-fuse-min-tokens", "128"),
        ("--tokenweave-min-tokens", "--tokenweave-fuse-min-tokens"),
    ),
}


# The parsing of each is in tests/test_config.py; these differ in who says no, and when.
ORDINARY = ("unknown-stock-launcher", "not-switched-on", "ray", "contradiction")


@pytest.fixture(scope="module")
def refused(model: Callable[[str], Path]) -> dict[str, Server]:
    """Give every bad command line to a server of its own, three at a time."""
    servers = {
        name: Server(model("llama"), launcher=launcher, flags=flags)
        for name, (launcher, flags, _) in BAD_FLAGS.items()
        if THOROUGH or name in ORDINARY
    }
    names = list(servers)
    for start in range(0, len(names), 3):
        group = [servers[name] for name in names[start : start + 3]]
        for server in group:
            server.launch()
        for server in group:
            server.wait_until_ended(120)
    return servers


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ORDINARY else [rare]) for name in BAD_FLAGS],
)
def test_bad_flags_stop_at_once(name: str, refused: dict[str, Server]) -> None:
    _, _, named = BAD_FLAGS[name]
    server = refused[name]
    assert server.process.returncode == 2, server.text
    assert "Traceback" not in server.text
    assert "Load weight begin" not in server.text
    errors = [line for line in server.text.splitlines() if "error:" in line]
    assert len(errors) == 1, server.text
    for part in named:
        assert part in errors[0]


def _server(case: Case, model: Callable[[str], Path], *flags: str) -> Server:
    return Server(model(case.architecture), case.tp, (*flags, *case.flags))
