"""Write what a long run found, with the command, commit and machine it came from."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]


def write(
    path: Path,
    *,
    title: str,
    command: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    notes: Sequence[str] = (),
) -> None:
    """Replace `path` by a table of `rows`; readers never see half of it."""
    record = {
        "title": title,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "commit": commit(),
        "machine": machine(),
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "notes": list(notes),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    lines = json.dumps(record, indent=1, ensure_ascii=False)
    scratch.write_text(lines + "\n")
    scratch.replace(path)


@cache
def commit() -> str:
    """Return the commit of this tree at the first call, marked if tracked files differ from it.

    Where the tree has no git, the environment variable TOKENWEAVE_COMMIT tells it.
    """
    if named := os.environ.get("TOKENWEAVE_COMMIT"):
        return named
    found = _git("rev-parse", "--short=12", "HEAD")
    return found + ("-dirty" if _git("status", "--porcelain", "-uno") else "")


def machine() -> str:
    """Describe the machine and the software that counts here."""
    cores = len(os.sched_getaffinity(0))
    memory_gib = psutil.virtual_memory().total / 2**30
    software = ", ".join(f"{name} {version(name)}" for name in ("sglang", "torch"))
    return (
        f"{cores} cores of {platform.machine()}, {memory_gib:.0f} GiB, {_gpus()}; "
        f"Python {platform.python_version()}, {software}"
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()


def _gpus() -> str:
    count = torch.cuda.device_count()
    return f"{count} {torch.cuda.get_device_name()}" if count else "no GPU"
