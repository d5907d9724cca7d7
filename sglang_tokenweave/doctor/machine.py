"""Ask the operating system: device nodes, the container and its limits, sockets, memory."""

import os
import re
import resource
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from sglang_tokenweave.descriptors import ExchangeError, exchange, new_token
from sglang_tokenweave.doctor.facts import Machine

_EXCHANGE_S = 5.0  # of a trial between two threads; it takes milliseconds


def gather(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Machine:
    """Return what the system under `root` says."""
    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Machine(
        kernel_driver=_kernel_driver(root / "proc/driver/nvidia/version"),
        gpu_nodes=len(list((root / "dev").glob("nvidia[0-9]*"))),
        imex_channels=_num_channels(root / "dev/nvidia-caps-imex-channels"),
        container=_container(root, environment),
        seccomp=_has_seccomp(root / "proc/self/status"),
        exchange_problem=exchange_problem(),
        open_files=open_files,
        shm_bytes=_free_bytes(root / "dev/shm"),
        memory_bytes=available_memory(root / "proc/meminfo", root / "sys/fs/cgroup"),
    )


def _read(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(errors="replace")
    return ""


def _kernel_driver(file: Path) -> str | None:
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar ..."; the open module
    # says "Open Kernel Module for x86_64".
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", _read(file))
    return found[1] if found else None


def _num_channels(folder: Path) -> int:
    with suppress(OSError):
        return sum(os.access(file, os.R_OK | os.W_OK) for file in folder.glob("channel*"))
    return 0


def _container(root: Path, environment: Mapping[str, str]) -> str:
    if "KUBERNETES_SERVICE_HOST" in environment:
        return "kubernetes"
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    return "container" if environment.get("container") else ""


def _has_seccomp(status: Path) -> bool:
    return bool(re.search(r"^Seccomp:\s+2$", _read(status), re.MULTILINE))


def exchange_problem() -> str | None:
    """Pass descriptors between two threads as the ranks do between processes; None: it works."""
    token = new_token()
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor(2) as threads:
        ranks = [
            threads.submit(exchange, file.fileno(), rank, 2, token, _EXCHANGE_S)
            for rank in range(2)
        ]
        try:
            received = {descriptor for rank in ranks for descriptor in rank.result()}
        except (ExchangeError, OSError) as error:
            return str(error)
        for descriptor in received - {file.fileno()}:
            os.close(descriptor)
    return None


def _free_bytes(folder: Path) -> int:
    with suppress(OSError):
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize
    return 0


def available_memory(meminfo: Path, cgroup: Path) -> int:
    """Return the bytes that new processes can take: the machine's, or less in a container."""
    lines = [line.split() for line in _read(meminfo).splitlines()]
    available = sum(int(line[1]) * 1024 for line in lines if line[:1] == ["MemAvailable:"])
    limit = _read(cgroup / "memory.max").strip()
    if not limit.isdigit():  # no container, or one without a limit
        return available
    used = int(_read(cgroup / "memory.current") or 0)
    # The kernel gives back cached files before it refuses memory.
    cached = re.search(r"^inactive_file (\d+)$", _read(cgroup / "memory.stat"), re.MULTILINE)
    return min(available, int(limit) - used + (int(cached[1]) if cached else 0))
