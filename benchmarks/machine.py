"""What a result must say of the machine and the software it was measured with."""

import argparse
import os
import re
import subprocess
from datetime import UTC, datetime
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import torch

import sglang_tokenweave
from benchmarks.schema import COMMIT, NOT_INSTALLED, Meta
from sglang_tokenweave.switches import why_multicast_is_forbidden

_ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT_S = 30
_NO_GPU = ("no GPU", "none", "")  # its name, driver and clocks: for a smoke test on a CPU
# Distribution: module.
_PACKAGES = {"sglang": "sglang", "flashinfer-python": "flashinfer"}


def meta(world_size: int, command: str, commit: str | None, rounds: int, *, smoke: bool) -> Meta:
    """Describe this machine, tree and run.

    Raises:
        RuntimeError: git or the driver does not answer; the text says what to do.
    """
    gpu, driver, clocks = _gpu() if torch.cuda.is_available() or not smoke else _NO_GPU
    return Meta(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        gpu=gpu,
        driver=driver,
        world_size=world_size,
        versions=versions(),
        commit=commit or git_commit(_ROOT),
        command=command,
        rounds=rounds,
        clocks=clocks,
        multicast=why_multicast_is_forbidden(os.environ) or "",
        smoke=smoke,
    )


def add_arguments(parser: argparse.ArgumentParser, bench: str) -> None:
    """Add what every benchmark takes: the commit that a result states, and its file."""
    add_commit(parser)
    default = Path(f"benchmarks/results/{bench}.json")
    parser.add_argument("--output", type=Path, default=default)


def add_commit(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the commit; another text is refused before anything is measured."""
    text = "of this tree, where git cannot tell"
    parser.add_argument("--commit", type=_commit, metavar="HASH", help=text)


def versions() -> dict[str, str]:
    """Return the versions that a result states, by the names of `schema.VERSIONS`."""
    cuda = torch.version.cuda
    nccl = torch.cuda.nccl.version() if cuda and torch.distributed.is_nccl_available() else ()
    found = {module: _version(package, module) for package, module in _PACKAGES.items()}
    return {
        "torch": torch.__version__,
        "nccl": ".".join(map(str, nccl)) or NOT_INSTALLED,
        "cuda": cuda or NOT_INSTALLED,
        **found,
        "sglang_tokenweave": sglang_tokenweave.__version__,
    }


def _commit(text: str) -> str:
    if not re.fullmatch(COMMIT, text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected 7 to 40 digits of a commit's hash, and -dirty where files differ"
        )
    return text


def git_commit(root: Path) -> str:
    """Return the commit of the tree, marked if tracked files differ from it.

    Raises:
        RuntimeError: git cannot tell.
    """
    try:
        commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
        changed = _output("git", "-C", str(root), "status", "--porcelain", "-uno")
    except RuntimeError as error:
        raise RuntimeError(f"name the commit with --commit, as git cannot tell: {error}") from error
    return commit + ("-dirty" if changed else "")


def _version(package: str, module: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if find_spec(module) is None:
            return NOT_INSTALLED
        return str(getattr(import_module(module), "__version__", "unknown"))


def _gpu() -> tuple[str, str, str]:
    driver, clock, power = _nvidia_smi("driver_version", "clocks.max.sm", "power.limit")
    name: str = torch.cuda.get_device_name(0)
    return name, driver, f"SM at most {clock}, power limit {power}"


def _nvidia_smi(*fields: str) -> list[str]:
    query = ("--query-gpu=" + ",".join(fields), "--format=csv,noheader", "--id=0")
    return [word.strip() for word in _output("nvidia-smi", *query).split(",")]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or ""
        raise RuntimeError(f"{' '.join(command)}: {error} {detail}".strip()) from error
    return done.stdout.strip()
