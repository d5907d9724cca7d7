"""The first requests to a new server: is it healthy, does it answer, did it weave?"""

import http.client
import json
import random
import shlex
import urllib.request
from pathlib import Path
from typing import Any

# The server is on this machine: a proxy that the user's environment names must not come between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# More tokens than the default of --tokenweave-min-tokens; on a CPU, three prefill chunks.
_NUM_WORDS = 1200
_WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "wizards", "mix"]


def is_healthy(url: str) -> bool:
    """Say whether the server at `url` can generate a token."""
    try:
        with _OPENER.open(f"{url}/health_generate", timeout=10) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # refused, timed out, or 503 while it warms up
        return False


def get_json(url: str) -> Any:
    """Return what `url` answers."""
    with _OPENER.open(url, timeout=30) as answer:
        return json.load(answer)


def post_json(url: str, body: Any) -> Any:
    """Send `body` to `url` and return the answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with _OPENER.open(request, timeout=300) as answer:
        return json.load(answer)


def demo_request(seed: int) -> dict[str, Any]:
    """Return a request with a prompt long enough to be woven, another one for each seed."""
    prompt = " ".join(random.Random(seed).choices(_WORDS, k=_NUM_WORDS))
    sampling = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}
    return {"text": prompt, "sampling_params": sampling}


def curl_line(url: str, body: Path) -> str:
    """Return a shell command that sends the file `body` to the server."""
    json_header = "Content-Type: application/json"
    command = ["curl", "-sS", "--noproxy", "*", "-H", json_header, "--data-binary", f"@{body}"]
    return shlex.join([*command, f"{url}/generate"])


def describe_weaving(server_info: dict[str, Any]) -> str:
    """Say in one line what the server wove so far, or why it does not weave."""
    states = server_info.get("internal_states") or [{}]
    state = states[0].get("tokenweave")
    if state is None:
        return "the server says nothing about TokenWeave"
    if not state["active"]:
        return f"TokenWeave is not active, the server runs stock: {'; '.join(state['reasons'])}"
    woven = [f"{plans['weave']} {mode}" for mode, plans in state["batches"].items()]
    return f"woven batches so far: {', '.join(woven)} (transport: {state['transport']})"
