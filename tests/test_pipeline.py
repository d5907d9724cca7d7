"""Pipeline parallelism: a server of two woven stages answers what stock answers."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import workloads
from server import INSTALLED, WEAVE, Server, after_import
from thorough import rare
from workloads import Answers

from sglang_tokenweave import cpu

pytestmark = pytest.mark.server

FLAGS = ("--pp-size", "2", "--enable-metrics", "--tokenweave-strict", *WEAVE)
PLANS = ("off", "fuse", "weave")
Batches = dict[tuple[str, str, str], int]  # number by stage, mode and plan
SHORT = ("long_prompt", "chunked", "decode")
# Of every three batches to be woven, both stages weave one, only the first or the last the others.
TAKING_TURNS = """
_plan = Runtime.plan
_turns = {}
def plan(self, batch):
    planned = _plan(self, batch)
    if planned is None or planned[1].kind is Kind.OFF:
        return planned
    kind = batch.forward_mode.is_decode()
    turn = _turns[kind] = (_turns.get(kind, -1) + 1) % 3
    runs_stock = turn == (2 if self.model.place.is_first else 1)
    return None if runs_stock else planned
Runtime.plan = plan
"""


@dataclass(frozen=True)
class Setup:
    """A server of two stages by two ranks. Every one is compared with stock at TP=2, one stage."""

    architecture: str = "llama"
    flags: tuple[str, ...] = ()
    sglang: str = INSTALLED
    asked: tuple[str, ...] = SHORT
    takes_turns: bool = False
    nodes: int = 1  # SGLang's word for what starts one launcher; here all on this machine


SETUPS = {
    "llama": Setup(
        flags=("--enable-mixed-chunk",),
        asked=(*SHORT, "short_batch", "prefix_hit", "while_decoding"),
        takes_turns=True,
    ),
    "llama-0.5.17": Setup(sglang="0.5.17", takes_turns=True),
    "mixtral-on-two-nodes": Setup("mixtral", nodes=2),
}


@pytest.mark.parametrize(
    "setup",
    [
        pytest.param(setup, id=name, marks=[rare] if setup.sglang != INSTALLED else [])
        for name, setup in SETUPS.items()
    ],
)
def test_equals_stock(
    setup: Setup, model: Callable[[str], Path], stock: Callable[..., Answers], tmp_path: Path
) -> None:
    expected = stock(setup.architecture, setup.asked)
    turns = after_import(tmp_path, "sglang_tokenweave.runtime", TAKING_TURNS)

    def node(*flags: str) -> Server:
        return Server(
            model(setup.architecture),
            flags=(*FLAGS, *setup.flags, *flags),
            sglang=setup.sglang,
            pythonpath=[turns] if setup.takes_turns else [],
            # On a CPU each rank is given its cores: 0.5.17 counts those of a stage, others all.
            environment={} if setup.sglang == "0.5.17" else cpu.environment(4),
        )

    with _all_nodes(setup.nodes, node) as servers:
        for workload in setup.asked:
            workloads.assert_equal(expected[workload], workloads.run(servers[0], workload))
        state = servers[0].tokenweave()
        batches: Batches = {}
        for server in servers:
            batches |= _batches(server)
        log = "".join(server.log() for server in servers)

    assert state is not None
    assert (state["active"], state["reasons"], state["notes"]) == (True, [], []), state
    assert (state["tp_size"], state["pp_size"]) == (2, 2)
    assert not state["fallbacks"]
    assert state["cuts"]["inside"] > 0
    assert "pipeline stage 1 of 2" in log
    assert "pipeline stage 2 of 2" in log
    _assert_woven_on_both_stages(batches, setup.takes_turns)


def _assert_woven_on_both_stages(batches: Batches, takes_turns: bool) -> None:
    for mode in ("prefill", "decode"):
        first, second = (
            {plan: batches.get((stage, mode, plan), 0) for plan in PLANS} for stage in "01"
        )
        assert first["weave"] > 0, batches
        if takes_turns:
            assert abs(first["weave"] - second["weave"]) <= 1, batches
            # A third each ran stock, beside what is too small to be woven.
            assert min(first["off"], second["off"]) >= first["weave"] // 2 - 1, batches
        else:
            assert first == second, "the stages ran a batch differently"


@contextmanager
def _all_nodes(num_nodes: int, node: Callable[..., Server]) -> Iterator[list[Server]]:
    """Start the nodes of one server; the first is the one to ask."""
    if num_nodes == 1:
        with node() as server:
            yield [server]
        return
    second = node("--nnodes", "2", "--node-rank", "1")
    second.launch()
    address = f"127.0.0.1:{second.port + 1}"  # where the second looks for the first
    try:
        with node("--nnodes", "2", "--node-rank", "0", "--dist-init-addr", address) as first:
            yield [first, second]
    finally:
        second.stop(check=False)


def _batches(server: Server) -> Batches:
    """Return the number of batches by stage, mode and plan."""
    found = {}
    pattern = re.compile(r"^sglang:tokenweave_batches_total\{(.*)\} (\S+)$", re.MULTILINE)
    for labels, value in pattern.findall(server.request("/metrics").text):
        given = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[given["pp_rank"], given["mode"], given["plan"]] = int(float(value))
    return found
