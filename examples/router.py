"""Put SGLang's router before two (or more) running servers, and see each answer its share.

    bash launch/serve.sh --port 30000        # one shell each
    bash launch/serve.sh --port 31000
    .venv/bin/python examples/router.py --url http://127.0.0.1:30000 --url http://127.0.0.1:31000

The router is a package of its own: pip install sglang-router==0.3.2 (the extra `examples`).
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import requests

START_DEADLINE_S = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", action="append", required=True, help="a replica; give it twice")
    parser.add_argument("--port", type=int, default=32000, help="the router's; default: 32000")
    parser.add_argument("--requests", type=int, default=8)
    options = parser.parse_args()

    before = [prefilled_tokens(url) for url in options.url]
    with running_router(options.port, options.url) as router:
        for number in range(options.requests):
            answer = generate(router, f"def function_{number}(self):\n")
            print(f"{number}: {answer!r}")
    for url, tokens in zip(options.url, before, strict=True):
        print(f"{url} read {prefilled_tokens(url) - tokens} tokens")


@contextmanager
def running_router(port: int, replicas: list[str]) -> Iterator[str]:
    """Start a router, wait until it knows every replica, and stop it in the end."""
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "sglang_router.launch_router"),
        *("--host", "127.0.0.1", "--port", str(port), "--worker-urls", *replicas),
        # In turn, so that a short run shows it; the default sends like prompts to one replica,
        # which has their prefix in its cache.
        *("--policy", "round_robin"),
    ]
    process = subprocess.Popen(command)
    try:
        wait_until_ready(process, url, len(replicas))
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_ready(process: subprocess.Popen, url: str, num_replicas: int) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            workers = requests.get(f"{url}/workers", timeout=5).json()["workers"]
        except (requests.RequestException, KeyError):
            workers = []
        if sum(worker["is_healthy"] for worker in workers) == num_replicas:
            return
        time.sleep(0.2)
    raise SystemExit(f"the router is not ready (exit code {process.poll()}): see its log above")


def generate(url: str, prompt: str) -> str:
    sampling = {"temperature": 0, "max_new_tokens": 24}
    request = {"text": prompt, "sampling_params": sampling}
    answer = requests.post(f"{url}/generate", json=request, timeout=120)
    answer.raise_for_status()
    return answer.json()["text"]


def prefilled_tokens(url: str) -> int:
    """Return how many prompt tokens a replica has computed since it started."""
    info = requests.get(f"{url}/server_info", timeout=30).json()
    return sum(info["internal_states"][0]["tokenweave"]["tokens"]["prefill"].values())


if __name__ == "__main__":
    main()
