"""The HTTP API of a woven server under schemathesis: nothing fails that does not fail on stock."""

import re
from pathlib import Path

import http_api
import pytest
from http_api import Failure, Findings
from thorough import THOROUGH

OPERATION = "POST /generate"
# What runs batches. Of chats, no more than a few requests are made in the time that each has.
RUN = "^/(generate|v1/completions|abort_request)$"
STOCK = Failure(OPERATION, "UndefinedStatusCode", 400)
NEW = Failure(OPERATION, "ServerError", 500)


@pytest.mark.server
def test_nothing_fails_that_stock_does_not(tmp_path: Path) -> None:
    with http_api.serve(tmp_path) as (stock, woven):
        findings = http_api.explore(stock, woven, num_examples=3, only="" if THOROUGH else RUN)
        assert woven.request("/health_generate").status_code == 200
        state = woven.tokenweave()
    assert findings.new == []
    assert len(findings.requests) >= (45 if THOROUGH else 4), "operations of /openapi.json"
    chat = ["POST /v1/chat/completions"] if THOROUGH else []
    for operation in (OPERATION, "POST /v1/completions", *chat):
        assert findings.requests[operation] >= 3
    assert findings.stock, "no answer failed a check: they were not checked"
    assert state is not None
    assert state["tokens"]["prefill"]["weave"] > 0
    assert not state["fallbacks"]


def test_a_new_failure_is_named_and_one_of_stock_is_not(tmp_path: Path) -> None:
    findings = Findings()
    findings.requests[OPERATION] = 8
    findings.stock[STOCK] = 3
    findings.woven.update({STOCK: 2, NEW: 1})
    assert findings.new == [NEW]
    output = tmp_path / "http.json"
    http_api.write(output, "a command", 4, findings)
    assert "Only woven: Failure(operation='POST /generate', check='ServerError'" in (
        output.read_text()
    )


def test_what_changes_the_server_is_left_out() -> None:
    paths = ["/flush_cache", "/pause_generation", "/update_weights_from_disk", "/start_profile"]
    for path in paths:
        assert any(re.search(pattern, path) for pattern in http_api.EXCLUDED.values())
    for path in ("/generate", "/v1/models", "/v1/chat/completions", "/abort_request", "/v1/loads"):
        assert not any(re.search(pattern, path) for pattern in http_api.EXCLUDED.values())


def spin() -> None:
    while True:
        pass


def test_a_limit_of_cpu_time_ends_what_takes_longer() -> None:
    with http_api.cpu_limit(0.05), pytest.raises(http_api.OutOfTimeError):
        spin()
    with http_api.cpu_limit(60):
        pass
