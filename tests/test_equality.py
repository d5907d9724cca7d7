"""A woven server answers what the stock server answers, and really weaves while it does."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import workloads
from server import WEAVE, Server
from thorough import THOROUGH
from workloads import WORKLOADS, Answers

pytestmark = pytest.mark.server

FUSE = ("--tokenweave-fuse-min-tokens", "1", "--tokenweave-min-tokens", "100000")


@dataclass(frozen=True)
class Setup:
    """A woven server and the plan its batches must get. Every one is compared with stock, TP=2."""

    architecture: str
    flags: tuple[str, ...] = WEAVE
    tp: int = 2
    # What the layers of an architecture can get wrong: a cut inside a request, one between two, a
    # prefix in the cache, and decoding. All else does not see them.
    workloads: tuple[str, ...] = ("long_prompt", "short_batch", "chunked", "decode")

    @property
    def asked(self) -> tuple[str, ...]:
        return tuple(WORKLOADS) if THOROUGH else self.workloads

    @property
    def plan(self) -> str:
        return "fuse" if self.flags == FUSE else "weave"

    @property
    def splits_decode(self) -> bool:
        return "--tokenweave-decode-min-tokens" in self.flags


BATCHES = ("short_batch", "decode", "while_decoding", "aborted", "concurrent")
SETUPS = {
    "llama": Setup("llama", workloads=tuple(WORKLOADS)),
    # Decode batches stay whole here, but join prefills.
    "llama-mixed": Setup(
        "llama",
        ("--tokenweave-min-tokens", "4", "--enable-mixed-chunk"),
        workloads=("chunked", *BATCHES),
    ),
    "llama-fuse": Setup("llama", FUSE, workloads=("long_prompt", "prefix_hit", *BATCHES)),
    "llama-tp4": Setup("llama", tp=4),
    "mistral": Setup("mistral", workloads=()),  # SGLang's class is Llama's
    "qwen2": Setup("qwen2", workloads=()),  # its biases are those of Qwen2-MoE
    "qwen3": Setup("qwen3"),
    "mixtral": Setup("mixtral"),
    "mixtral-fuse": Setup("mixtral", FUSE, workloads=()),
    "qwen2_moe": Setup("qwen2_moe"),
    "qwen3_moe": Setup("qwen3_moe"),
}


CASES = [
    pytest.param(setup, workload, id=f"{name}-{workload}")
    for name, setup in SETUPS.items()
    for workload in setup.asked
]


@dataclass(frozen=True)
class Woven:
    """A running woven server and what stock answered."""

    setup: Setup
    server: Server
    stock: Answers


@pytest.fixture(scope="module")
def woven_as(
    model: Callable[[str], Path],
    pythonpath: Callable[[str], list[Path]],
    stock: Callable[..., Answers],
) -> Iterator[Callable[[Setup], Woven]]:
    """Return a function to the running server of a setup, in place of the one before."""
    running: list[Woven] = []
    with ExitStack() as stack:

        def woven(setup: Setup) -> Woven:
            if running and running[0].setup is setup:
                return running[0]
            running.clear()
            stack.close()
            # Before the woven one starts: both at once would share the cores.
            answers = stock(setup.architecture, setup.asked)
            server = Server(
                model(setup.architecture),
                setup.tp,
                ("--tokenweave-strict", *setup.flags),
                pythonpath=pythonpath(setup.architecture),
            )
            running.append(Woven(setup, stack.enter_context(server), answers))
            return running[0]

        yield woven


@pytest.mark.parametrize(("setup", "workload"), CASES)
def test_equals_stock(woven_as: Callable[[Setup], Woven], setup: Setup, workload: str) -> None:
    woven = woven_as(setup)
    before = _state(woven.server)
    answers = workloads.run(woven.server, workload)
    after = _state(woven.server)

    workloads.assert_equal(woven.stock[workload], answers)
    assert (after["active"], after["reasons"], after["notes"]) == (True, [], [])
    assert after["tp_size"] == setup.tp
    assert not after["fallbacks"]
    _assert_planned(setup, workload, _growth(before, after))


def test_one_rank_runs_stock(model: Callable[[str], Path], stock: Callable[..., Answers]) -> None:
    compared = ("long_prompt", "short_batch")
    expected = stock("llama", compared)
    with Server(model("llama"), tp=1, flags=WEAVE) as server:
        state = _state(server)
        assert not state["active"]
        assert any("tensor parallel size" in reason for reason in state["reasons"]), state
        for workload in compared:
            # Another TP size sums in another order: same tokens, rounding within the tolerance.
            workloads.assert_equal(expected[workload], workloads.run(server, workload))
        assert _state(server)["tokens"]["prefill"]["weave"] == 0


def test_comparison_can_fail() -> None:
    one = workloads.Answer(tokens=(1, 2), logprobs=(-1.0, -2.0), margins=(0.1, 0.2))
    workloads.assert_equal([one], [replace(one, logprobs=(-1.0, -2.00001))])
    for other in (replace(one, tokens=(1, 3)), replace(one, logprobs=(-1.0, -2.001))):
        with pytest.raises(AssertionError, match="1 of 1 differ"):
            workloads.assert_equal([one], [other])
    with pytest.raises(AssertionError):
        workloads.assert_equal([one], [])


def _state(server: Server) -> dict[str, Any]:
    state = server.tokenweave()
    assert state is not None, "/server_info has no block of ours"
    return state


def _growth(before: Any, after: Any) -> Any:
    """Subtract nested counters."""
    if isinstance(after, dict):
        return {name: _growth(before.get(name), value) for name, value in after.items()}
    is_count = isinstance(after, int) and isinstance(before, int)
    return after - before if is_count else after


def _assert_planned(setup: Setup, workload: str, done: dict[str, Any]) -> None:
    prefill, decode = done["tokens"]["prefill"], done["batches"]["decode"]
    if workload in ("long_prompt", "short_batch", "chunked"):
        assert prefill[setup.plan] >= 0.9 * sum(prefill.values()), prefill
    if workload == "long_prompt" and setup.plan == "weave":
        assert done["cuts"]["inside"] > 0
    if workload == "short_batch" and setup.plan == "weave":
        assert sum(done["cuts"].values()) > 0
    if workload == "decode":
        splits = setup.splits_decode or setup.plan == "fuse"
        assert (decode[setup.plan] > 0) == splits, decode
