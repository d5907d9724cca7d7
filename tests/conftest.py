"""Fixtures that files share: tiny models and the answers of stock servers, once a session."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import faults
import pytest
import workloads
from server import Server, after_import

# Overrides of the tiny models' configurations, where SGLang's class expects another field.
_OVERRIDES = {"gemma2": {"hidden_act": "gelu_pytorch_tanh"}}
# The one Triton kernel on the path of these models, in torch: there is no Triton on a CPU.
_KERNEL = "sglang.kernels.ops.elementwise.elementwise"
_KERNEL_IN_TORCH = """
def fused_gate_sigmoid_mul_add(hidden_states, gate_weight, shared_output, final_hidden_states):
    import torch
    gate = torch.sigmoid(hidden_states @ gate_weight).unsqueeze(-1)
    final_hidden_states += gate * shared_output
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from an architecture's name to the folder of a tiny model of it."""
    from sglang_tokenweave.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("models")
    return lambda name: make_tiny_model(name, folder / name, **_OVERRIDES.get(name, {}))


@pytest.fixture(scope="session")
def pythonpath(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """Return a function from an architecture to what its server needs on PYTHONPATH on a CPU."""
    folder = after_import(tmp_path_factory.mktemp("kernel"), _KERNEL, _KERNEL_IN_TORCH)
    return lambda name: [folder] if name == "qwen2_moe" else []


@pytest.fixture(scope="session")
def stock_llama(model: Callable[[str], Path]) -> tuple[workloads.Answers, faults.Undisturbed]:
    """Return what a stock server answers to all workloads, and to the questions of faults.py."""
    with Server(model("llama"), launcher="stock") as server:
        answers = {workload: workloads.run(server, workload) for workload in workloads.WORKLOADS}
        outcomes = [faults.ask(server, question) for question in (*faults.LONG, faults.SHORT)]
    assert not faults.errors(outcomes)
    return answers, {outcome.question: outcome.tokens for outcome in outcomes}


@pytest.fixture(scope="session")
def stock(
    model: Callable[[str], Path],
    pythonpath: Callable[[str], list[Path]],
    request: pytest.FixtureRequest,
) -> Callable[[str, Iterable[str]], workloads.Answers]:
    """Return a function to a stock server's answers at TP=2, by architecture and workloads."""
    known: dict[str, workloads.Answers] = {}

    def answers(name: str, of: Iterable[str]) -> workloads.Answers:
        if name == "llama":  # for many tests, so of all workloads at once
            return request.getfixturevalue("stock_llama")[0]
        found = known.setdefault(name, {})
        missing = [workload for workload in of if workload not in found]
        if missing:
            with Server(model(name), launcher="stock", pythonpath=pythonpath(name)) as server:
                found.update({each: workloads.run(server, each) for each in missing})
        return found

    return answers


@pytest.fixture(scope="session")
def undisturbed(
    stock_llama: tuple[workloads.Answers, faults.Undisturbed],
) -> faults.Undisturbed:
    """Return what a stock server answers to the questions of tests/faults.py."""
    return stock_llama[1]


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait for a GPU, whose runners are stand-ins."""
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[faults.Fault]:
    """Record what the test sees of its fault: docs/tools/reliability.py reads the report."""
    found = faults.Fault(*request.node.get_closest_marker("fault").args)
    yield found
    request.node.user_properties.append(("fault", json.dumps(asdict(found))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start servers, the longest: at the end two workers share evenly."""
    first = {item.path for item in items if item.get_closest_marker("server")}
    items.sort(key=lambda item: item.path not in first)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the end of the running servers' logs under a failed test."""
    report = yield
    if report.failed:
        for server in Server.running:
            report.sections.append((f"log of the server on port {server.port}", server.log_tail()))
    return report
