"""Faults of a woven server on two GPUs: in its graphs and kernels, under load.

With TOKENWEAVE_FAULTS=FILE.json what was seen is written there, for the reliability page.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import gpu_servers
import pytest
import recording
import torch
from gpu_servers import MODEL, WEAVE
from server import Server
from woven_servers import FLAGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

# Everything is woven: prefills in graphs of ours, decodes of two requests or more in SGLang's.
WEAVES = {
    "kernel": (*WEAVE, "--tokenweave-decode-min-tokens", "2"),
    "copy engines": (*WEAVE, "--tokenweave-decode-min-tokens", "2", "--tokenweave-ctas", "0"),
}
# Else SGLang waits for a core dump for a minute.
ENVIRONMENT = gpu_servers.ENVIRONMENT | {"SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
PAUSE_S = 4
END_DEADLINE_S = 75  # 20 s of ours, and what SGLang takes to end
ERROR_WITHIN_S = 30  # what a client is promised
WOVEN = faults.Question(77, 8)  # nobody has asked it yet, so that no part of it is cached
# What a driver keeps of a process that has ended, for a while; and how long it may take to free the
# rest, after a kernel that waits for a rank has come to its own deadline.
KEPT_BYTES = 64 * 2**20
FREED_WITHIN_S = 40
COLUMNS = ("fault", "where", "after", "what the user sees", "leaks")
ROWS: list[list[str]] = []


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    path = os.environ.get("TOKENWEAVE_FAULTS")
    if path and ROWS:
        recording.write(
            Path(path),
            title="Faults on two GPUs",
            command="TOKENWEAVE_FAULTS=... python -m pytest tests/test_faults_gpu.py",
            columns=COLUMNS,
            rows=ROWS,
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from sglang_tokenweave.tiny_model import make_tiny_model

    return make_tiny_model("llama", tmp_path_factory.mktemp("model") / "llama", "bfloat16", **MODEL)


def start(model, weave, pythonpath=()):
    flags = (*FLAGS, "--tokenweave-strict", *WEAVES[weave])
    return Server(model, tp=2, flags=flags, pythonpath=pythonpath, environment=ENVIRONMENT)


def used_bytes():
    return [total - free for free, total in map(torch.cuda.mem_get_info, range(2))]


def is_freed(before):
    """Wait until the GPUs hold no more than before, or for so long that it is a leak."""
    end = time.monotonic() + FREED_WITHIN_S
    while any(now - then > KEPT_BYTES for now, then in zip(used_bytes(), before, strict=True)):
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def assert_whole_or_error(outcomes):
    """What says that it is whole has all tokens; in bfloat16 no two batches give the same ones."""
    for outcome in outcomes:
        if outcome.error is None:
            assert len(outcome.tokens) == outcome.question.num_tokens, outcome


def note(fault, where, seconds, sees, leaks):
    ROWS.append([fault, where, f"{seconds:.1f} s", sees, str(leaks)])


@pytest.mark.parametrize("weave", WEAVES)
def test_a_rank_that_stops_is_waited_for_and_one_that_is_killed_ends_the_server(model, weave):
    before = used_bytes()
    with start(model, weave) as server:
        with faults.clients(server) as clients:
            os.kill(server.rank_process(1), signal.SIGSTOP)
            time.sleep(PAUSE_S)
            os.kill(server.rank_process(1), signal.SIGCONT)
            began = time.monotonic()
            after = faults.ask(server, faults.SHORT)
            outcomes = [*clients.long(), *clients.short(), after]
        assert not faults.errors(outcomes)
        assert_whole_or_error(outcomes)
        sees = "every answer, late"
        note("a rank is stopped, then continued", f"rank 1, {weave}", after.ended - began, sees, 0)

        state = server.tokenweave()
        assert state["fallbacks"] == {}
        assert state["batches"]["decode"]["weave"] > 0
        with faults.clients(server) as clients:
            server.note_shared_memory()
            began = time.monotonic()
            os.kill(server.rank_process(1), signal.SIGKILL)
            assert server.wait_until_ended(END_DEADLINE_S) != 0
            outcomes = [*clients.long(), *clients.short()]
    seen_to_end(outcomes, server, before, "a rank is killed (SIGKILL)", weave, began)


@pytest.mark.parametrize("weave", WEAVES)
def test_a_rank_that_never_comes_ends_the_server_with_its_name(model, weave, tmp_path):
    """In a woven batch: elsewhere the others wait in SGLang's communication, for its watchdog."""
    before = used_bytes()
    with (
        start(model, weave, [faults.obedient(tmp_path)]) as server,
        faults.clients(server) as clients,
        ThreadPoolExecutor() as pool,
    ):
        server.note_shared_memory()
        faults.order(server, "stop", "run", 1)
        began = time.monotonic()
        woven = pool.submit(faults.ask, server, WOVEN)
        assert server.wait_until_ended(END_DEADLINE_S) != 0
        outcomes = [*clients.long(), *clients.short(), woven.result(60)]
    seen_to_end(outcomes, server, before, "a rank is stopped for ever", weave, began)
    assert max(outcome.ended for outcome in outcomes) - began <= ERROR_WITHIN_S
    faults.said(
        server, r"rank 0, CTA \d+ waited \d+ ms for rank 1|a stream has waited \d+ s for flags"
    )


def seen_to_end(outcomes, server, before, fault, weave, began):
    """Check what clients got of a server that ended, and that nothing is left."""
    assert_whole_or_error(outcomes)
    assert faults.errors(outcomes)
    assert server.left == []
    ended = max(outcome.ended for outcome in outcomes)
    assert is_freed(before)
    sees = ", ".join(sorted(faults.errors(outcomes)))
    note(fault, f"rank 1, {weave}", ended - began, sees, len(server.left))
