"""One probe, in a process of its own: `python -m sglang_tokenweave.doctor.probe NAME SECONDS`.

Libraries may crash, hang, print, and register what they like; here it harms nobody. The answer, or
a `Failure`, leaves as JSON on standard output.
"""

import importlib
import os
import signal
import sys
from typing import Any

from sglang_tokenweave.doctor.answers import to_text
from sglang_tokenweave.doctor.facts import Failure

PROBES = {
    "cuda": ("cuda_facts", "gather"),
    "nvml": ("nvml_facts", "gather"),
    "nvrtc": ("software", "gather_nvrtc"),
    "sglang": ("software", "gather_sglang"),
}


def ask(name: str) -> Any:
    """Return the answer of a probe, or why there is none."""
    module, function = PROBES[name]
    try:
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)()
    except ImportError as error:
        return Failure("missing", _one_line(error))
    except Exception as error:  # noqa: BLE001 - whatever a broken library raises is its answer
        return Failure("error", _one_line(error))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def main(name: str, seconds: str) -> None:
    """Answer on standard output, which is kept free of what libraries print."""
    signal.alarm(int(seconds))  # should the doctor itself be gone
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with answers:
        answers.write(to_text(ask(name)))
    os._exit(0)  # a library's threads and exit handlers have nothing to add


if __name__ == "__main__":
    main(*sys.argv[1:])
