"""The first requests to a new server: is it healthy, does it answer, did it weave?"""

import http.client
import json
import random
import re
import shlex
import textwrap
import urllib.request
from pathlib import Path
from typing import Any

from launch.stdlib_text import module_files

# The server is on this machine: a proxy that the user's environment names must not come between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# Lengths of prompts in characters. The demo model reads bytes, 2048 at most: three prefill chunks
# on a CPU. Other models read three to four at once, and the default of --tokenweave-min-tokens is
# to be reached.
SHORT, LONG = 1400, 7000
_HEADER = re.compile(r"^ *def \w+\(.*\).*:\n", re.MULTILINE)


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


def demo_request(seed: int, length: int) -> dict[str, Any]:
    """Return a request to write a function's body, whose prompt is long enough to be woven.

    The prompt is Python source that the demo model has not seen, another one for each seed.
    """
    starts: list[str] = []
    for module in module_files(held_out=True):
        text = module.read_text(errors="ignore")
        ends = [match.end() for match in _HEADER.finditer(text)]
        starts += [text[end - length : end] for end in ends if end >= length]
    if not starts:
        raise FileNotFoundError("this Python comes without the sources of its standard library")
    sampling = {"max_new_tokens": 160, "temperature": 0}
    return {"text": random.Random(seed).choice(starts), "sampling_params": sampling}


def excerpt(request: dict[str, Any], answer: dict[str, Any]) -> str:
    """Return the last lines of a prompt and what the model made of them."""
    ending = "".join(request["text"].splitlines(keepends=True)[-3:])
    return textwrap.indent(ending + answer["text"], "  | ", lambda line: True)


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
