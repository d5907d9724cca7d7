"""The servers that are soaked: tiny models on a CPU, or on two GPUs."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import gpu_servers
from server import LONG_START_S, WEAVE

from sglang_tokenweave.tiny_model import make_tiny_model

STOCK_FLAGS = ("--enable-metrics",)
FLAGS = (*STOCK_FLAGS, "--tokenweave-strict", *WEAVE)
# On GPUs: prefills in graphs of ours, decodes of two halves in SGLang's.
GPU_STOCK_FLAGS = (
    *("--device", "cuda", "--dtype", "bfloat16", "--attention-backend", "fa3"),
    *("--max-total-tokens", "131072", "--chunked-prefill-size", "2048"),
    *("--mem-fraction-static", "0.5", "--max-running-requests", "64"),
    *("--cuda-graph-bs-decode", *map(str, (1, 2, 4, 8, 16, 24, 32, 48, 64))),
    *("--cuda-graph-bs-prefill", *map(str, (128, 256, 512, 1024, 2048))),
)
# glibc keeps much of what is freed for later, in growing heaps (malloc_trim gave 50 to 100 MiB of a
# scheduler back). So told, it returns it at once, and what is measured is what is held.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


def make_model(folder: Path, *, on_gpus: bool) -> Path:
    """Write the model to a folder, and return it."""
    if on_gpus:
        return make_tiny_model("llama", folder, "bfloat16", **gpu_servers.MODEL)
    return make_tiny_model("llama", folder)


def server_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what makes the server under load."""
    stock = (*STOCK_FLAGS, *(GPU_STOCK_FLAGS if options.gpus else ()))
    weave = (
        *FLAGS,
        *stock,
        *(gpu_servers.WEAVE if options.gpus else ()),
        *shlex.split(options.flags),
    )
    woven = {"flags": weave}
    environment = ENVIRONMENT | (gpu_servers.ENVIRONMENT if options.gpus else {})
    kind = {"launcher": "stock", "flags": stock} if options.stock else woven
    return kind | {"environment": environment, "start_deadline_s": LONG_START_S}
