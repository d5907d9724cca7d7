"""The usual clients against a woven server, and the offline Engine."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import openai
import pytest
import workloads
from server import Server, environment
from workloads import Answers

from sglang_tokenweave import cpu

pytestmark = pytest.mark.server

PROMPT = "the quick brown fox jumps over lazy dog while seven wizards mix potions in rain"
ENGINE = """
import json
import sys


def main():
    from sglang_tokenweave import Engine

    arguments, request = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    try:
        Engine(**arguments, tokenweave={"min_token": 4})
    except ValueError as error:
        print("REFUSED", error)
    engine = Engine(**arguments, tokenweave={"min_tokens": 4, "strict": True})
    answers = [engine.generate(input_ids=ids, **request["options"]) for ids in request["prompts"]]
    state = engine.get_server_info()["internal_states"][0]["tokenweave"]
    print("RESULT", json.dumps({"answers": answers, "state": state}))
    engine.shutdown()


if __name__ == "__main__":  # the workers are spawned and import this file again
    main()
"""


@pytest.fixture(scope="module")
def server(model: Callable[[str], Path]) -> Iterator[Server]:
    flags = ("--tokenweave-strict", "--tokenweave-min-tokens", "4", "--enable-metrics")
    with Server(model("llama"), launcher="serve", flags=flags) as running:
        yield running
        state = running.tokenweave()
    assert state is not None
    assert state["tokens"]["prefill"]["weave"] > 0
    assert not state["fallbacks"]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(trust_env=False) as http,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", http_client=http, max_retries=0
        ) as opened,
    ):
        yield opened


def test_openai_chat(client: openai.OpenAI) -> None:
    request = {
        "model": "default",
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = client.chat.completions.create(**request)
    pieces = list(client.chat.completions.create(**request, stream=True))
    streamed = "".join(each.choices[0].delta.content or "" for each in pieces if each.choices)
    assert whole.choices[0].message.content
    assert streamed == whole.choices[0].message.content


def test_openai_completion(client: openai.OpenAI) -> None:
    request = {"model": "default", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(**request, logprobs=1)
    pieces = list(client.completions.create(**request, stream=True))
    assert whole.choices[0].text
    assert "".join(each.choices[0].text for each in pieces if each.choices) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.token_logprobs)


def test_bench_serving(server: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    result = tmp_path / "bench.jsonl"
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"),
        *("--host", "127.0.0.1", "--port", str(server.port), "--model", str(model("llama"))),
        # Random token ids: every other data set is downloaded.
        *("--dataset-name", "random-ids", "--num-prompts", "24", "--request-rate", "inf"),
        *("--random-input-len", "200", "--random-output-len", "12", "--random-range-ratio", "0.2"),
        *("--output-file", str(result), "--disable-tqdm"),
    ]
    done = subprocess.run(
        command,
        env=environment(2, pythonpath=_datasets_library(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(result.read_text().splitlines()[-1])
    assert figures["completed"] == 24, done.stdout


def test_engine(
    model: Callable[[str], Path], stock: Callable[..., Answers], tmp_path: Path
) -> None:
    expected = stock("llama", ["long_prompt"])["long_prompt"]
    script = tmp_path / "offline.py"
    script.write_text(ENGINE)
    prompts = [workloads.token_ids(seed, 480) for seed in (1, 2)]
    options = workloads.greedy_request(None)
    del options["input_ids"]
    request = {"prompts": prompts, "options": {**options, "logprob_start_len": 0}}
    arguments = {"model_path": str(model("llama")), **cpu.engine_arguments(2)}
    done = subprocess.run(
        [sys.executable, script, json.dumps(arguments), json.dumps(request)],
        env=environment(2),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stdout.splitlines()
    refused = [line for line in lines if line.startswith("REFUSED")]
    assert refused, done.stdout + done.stderr
    assert "'min_token'" in refused[0]
    found = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    assert found, done.stdout + done.stderr
    result = json.loads(found[0])
    assert result["state"]["active"]
    assert result["state"]["tokens"]["prefill"]["weave"] >= 2 * 480
    workloads.assert_equal(expected, [workloads.read_answer(raw) for raw in result["answers"]])
    assert done.returncode == 0, done.stderr


def _datasets_library(folder: Path) -> list[Path]:
    """Return a stand-in for `datasets`, which bench_serving imports for data that we do not use."""
    if find_spec("datasets"):
        return []
    (folder / "standin").mkdir()
    (folder / "standin" / "datasets.py").write_text("load_dataset = None\n")
    return [folder / "standin"]
