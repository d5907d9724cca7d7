"""Every supported release of SGLang: all hooks take, answers are right, a missing one is named."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import workloads
from server import INSTALLED, VERSIONS, WEAVE, Server, after_import, environment
from thorough import rare
from workloads import WORKLOADS, Answers

pytestmark = pytest.mark.server

SHORT = ("long_prompt", "short_batch", "chunked", "prefix_hit", "decode")
TARGET = "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends"
# SGLang goes on calling the method on its instances; whoever looks at the class misses it.
RENAMED = """
_moved = ModelRunner.init_attention_backends
del ModelRunner.init_attention_backends
def _find(self, name):
    if name == "init_attention_backends":
        return _moved.__get__(self)
    raise AttributeError(name)
ModelRunner.__getattr__ = _find
"""
TOUCHED_BY_US = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.model_executor.model_runner import ModelRunner
def is_hooked(function):
    while function is not None and "hook_registry" not in function.__code__.co_filename:
        function = getattr(function, "__wrapped__", None)
    return function is not None
functions = (ModelRunner.load_model, ModelRunner.init_attention_backends, Scheduler.run_batch)
print("touched:", [function.__qualname__ for function in functions if is_hooked(function)])
"""


# The installed release, the newest, is the one of every other test file. Of the models, one of each
# way in which the releases leave the sum over ranks to the caller.
@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("llama", "0.5.17"),
        ("qwen3_moe", "0.5.17"),
        pytest.param("mixtral", "0.5.17", marks=rare),
        ("llama", "0.5.21"),
        pytest.param("qwen3_moe", "0.5.21", marks=rare),
        pytest.param("mixtral", "0.5.21", marks=rare),
    ],
)
def test_equals_stock(
    name: str, version: str, model: Callable[[str], Path], stock: Callable[..., Answers]
) -> None:
    # In float32 all releases answer alike, so the installed one stands in for the stock of each.
    asked = tuple(WORKLOADS) if name == "llama" else SHORT
    expected = stock(name, asked)
    flags = ("--tokenweave-strict", *WEAVE)
    with Server(model(name), flags=flags, sglang=version) as server:
        state = server.tokenweave()
        assert state is not None
        assert (state["active"], state["reasons"], state["notes"]) == (True, [], []), state
        assert state["sglang"] == version
        assert f"TokenWeave ACTIVE: {state['model']}, tp=2" in server.log()
        for workload in asked:
            workloads.assert_equal(expected[workload], workloads.run(server, workload))
        state = server.tokenweave()
    assert state is not None
    assert state["tokens"]["prefill"]["weave"] > 5_000
    assert state["batches"]["decode"]["weave"] > 40
    assert not state["fallbacks"]


def test_the_installed_release_is_the_newest_supported() -> None:
    assert VERSIONS[-1] == INSTALLED


@rare  # without a server: tests/test_hooks.py
def test_missing_hook_stops_a_strict_server(tmp_path: Path, model: Callable[[str], Path]) -> None:
    server = Server(
        model("llama"),
        flags=("--tokenweave-strict", *WEAVE),
        pythonpath=[_without_target(tmp_path)],
    )
    server.launch()
    status = server.wait_until_ended(120)
    assert status not in (0, None)
    assert f"SGLang has no {TARGET}" in server.log()
    assert "Load weight begin" not in server.log()


@rare
def test_missing_hook_is_a_reason_otherwise(tmp_path: Path, model: Callable[[str], Path]) -> None:
    with Server(model("llama"), flags=WEAVE, pythonpath=[_without_target(tmp_path)]) as server:
        state = server.tokenweave()
        assert state is not None
        assert not state["active"]
        assert any(TARGET in reason for reason in state["reasons"]), state["reasons"]
        assert workloads.run(server, "short_batch")
        log = server.log()
    assert "TokenWeave is NOT active" in log
    assert TARGET in log


@pytest.mark.parametrize("version", VERSIONS)
def test_installed_but_off_touches_nothing(version: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOUCHED_BY_US],
        env=environment(1, version),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "touched: []" in done.stdout, done.stdout + done.stderr


def _without_target(folder: Path) -> Path:
    return after_import(folder, "sglang.srt.model_executor.model_runner", RENAMED)
