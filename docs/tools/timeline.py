"""Draw what one forward pass does, from a real run: docs/images/timeline.svg.

`python docs/tools/timeline.py record` starts two servers of a small random Llama on two CPU ranks,
one that fuses and one that weaves, notes when rank 0 computes and communicates during a prompt,
writes docs/images/timeline.json and draws it. `python docs/tools/timeline.py draw [OUT]` only
draws.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
PROMPT_TOKENS = 480
_MODEL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3}
_PLANS = {
    "fuse": ("--tokenweave-fuse-min-tokens", "8", "--tokenweave-min-tokens", "100000"),
    "weave": ("--tokenweave-min-tokens", "8"),
}
_COLOURS = {"first": "#3b6ea5", "second": "#d08a2e"}
# Runs inside sglang_tokenweave.weave in the server's processes. Every pass overwrites the file, so
# the last prompt's remains: by then nothing is done for the first time.
_RECORDER = """
import json as _json, os as _os, threading as _threading, time as _time
from dataclasses import replace as _replace
from sglang_tokenweave.reference import ReferenceTransport as _Transport

_events, _starts, _plain_run, _plain_transport_run = [], [], run, _Transport._run

def _note(what, tokens, start):
    half = "first" if tokens.data_ptr() == _starts[0] else "second"
    _events.append({"what": what, "half": half, "start": start, "end": _time.perf_counter()})

def _transport_run(self, slot, *arguments):
    start = _time.perf_counter()
    _plain_transport_run(self, slot, *arguments)
    if _starts:
        _note("communicate", slot.tensor, start)

def _timed(stage, name):
    def compute(half):
        start = _time.perf_counter()
        stage.compute(half)
        _note(name, half.slot.tensor, start)
    return _replace(stage, compute=compute)

def run(stages, halves, plan, transport):
    _events.clear()
    _starts[:] = [half.slot.tensor.data_ptr() for half in halves]
    names = ["attention", "feed-forward"] * (len(stages) // 2)
    _plain_run(list(map(_timed, stages, names)), halves, plan, transport)
    _starts.clear()
    if transport.rank == 0 and sum(half.slot.num_tokens for half in halves) >= 400:
        path = _os.environ["TOKENWEAVE_TIMELINE"]
        cut = halves[0].slot.num_tokens
        with open(path, "w") as file:
            _json.dump({"cut": cut, "events": _events}, file)

_Transport._run = _transport_run
"""


def record() -> dict[str, Any]:
    """Return when rank 0 did what, in milliseconds since the first event, by plan."""
    sys.path.insert(0, str(ROOT / "tests"))
    from server import Server, after_import
    from workloads import ask, token_ids

    from sglang_tokenweave.tiny_model import make_tiny_model

    runs = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "path").mkdir()
        path = after_import(folder / "path", "sglang_tokenweave.weave", _RECORDER)
        model = make_tiny_model("llama", folder / "model", **_MODEL)
        for plan, flags in _PLANS.items():
            out = folder / f"{plan}.json"
            extra = {"TOKENWEAVE_TIMELINE": str(out)}
            with Server(model, flags=flags, pythonpath=[path], environment=extra) as server:
                for seed in range(6):
                    ask(server, token_ids(seed, PROMPT_TOKENS), max_new_tokens=1)
            runs[plan] = _in_milliseconds(json.loads(out.read_text()))
    return {"tokens": PROMPT_TOKENS, "cores": len(os.sched_getaffinity(0)), "runs": runs}


def _in_milliseconds(run: dict[str, Any]) -> dict[str, Any]:
    zero = min(event["start"] for event in run["events"])
    for event in run["events"]:
        for end in ("start", "end"):
            event[end] = round((event[end] - zero) * 1000, 2)
    return {**run, "events": sorted(run["events"], key=lambda event: event["start"])}


def draw(recorded: dict[str, Any], out: Path) -> None:
    """Draw a panel per plan with a lane for the computation and one for the communication."""
    cut = recorded["runs"]["weave"]["cut"]
    titles = {
        "fuse": "FUSE: one part, each communication in line",
        "weave": f"WEAVE: cut after {cut} of {recorded['tokens']} tokens",
    }
    mpl.rcParams.update({"svg.hashsalt": "tokenweave", "font.size": 8, "svg.fonttype": "none"})
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(9, 3.6), layout="constrained")
    for axis, (plan, title) in zip(axes, titles.items(), strict=True):
        for event in recorded["runs"][plan]["events"]:
            _draw_event(axis, event, plan)
        axis.set_yticks([1, 0], ["computes", "communicates"])
        axis.set_title(title, loc="left")
    axes[1].set_xlabel("milliseconds (a CPU, two ranks; rank 0)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS.values()]
    figure.legend(handles, ["first half", "second half"], loc="outside upper right", ncols=2)
    figure.savefig(out, metadata={"Date": None})


def _draw_event(axis: Any, event: dict[str, Any], plan: str) -> None:
    lane = 0 if event["what"] == "communicate" else 1
    length = event["end"] - event["start"]
    colour = _COLOURS[event["half"]] if plan == "weave" else "#777777"
    axis.barh(lane, length, left=event["start"], height=0.7, color=colour, edgecolor="white")
    if lane == 1:
        label = {"attention": "attn", "feed-forward": "ffn"}[event["what"]]
        style = {"ha": "center", "va": "center", "size": 6, "color": "white"}
        axis.text(event["start"] + length / 2, lane, label, **style)


def main() -> None:
    """Record and draw, or only draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=["record", "draw"])
    parser.add_argument("out", nargs="?", type=Path, default=IMAGES / "timeline.svg")
    options = parser.parse_args()
    data = IMAGES / "timeline.json"
    if options.action == "record":
        data.write_text(json.dumps(record(), indent=1) + "\n")
    draw(json.loads(data.read_text()), options.out)


if __name__ == "__main__":  # SGLang spawns its workers
    main()
