"""What a machine must have to set up and serve. Each check raises one sentence: what came, what is
needed, what to do. They run before anything long starts, with nothing but the standard library.
"""

import errno
import shutil
import socket
import subprocess
import sys
from pathlib import Path

GB = 10**9
DISK_BYTES = 6 * GB
MEMORY_BYTES = 4 * GB
_COMPILERS = ("cc", "gcc", "clang")


class CheckError(Exception):
    """This machine or this command line cannot work; the text says why and what to do."""


def free_disk_bytes(folder: Path) -> int:
    """Return the space that a user may still fill beside `folder`."""
    return shutil.disk_usage(folder).free


def check_disk(folder: Path, free_bytes: int) -> None:
    """Refuse a disk on which the installed packages have no room."""
    if free_bytes < DISK_BYTES:
        raise CheckError(
            f"{free_bytes / GB:.1f} GB are free on the disk of {folder}, but the set-up needs "
            f"{DISK_BYTES // GB} GB: make room, or move the checkout to a larger disk"
        )


def available_memory_bytes(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return how much memory new processes can take: the machine's, or less in a container."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        counters = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except FileNotFoundError:  # no container, or one with another way to count
        return available
    if limit == "max":
        return available
    # The kernel gives back cached files before it refuses memory.
    return min(available, int(limit) - used + int(counters["inactive_file"]))


def check_memory(available_bytes: int) -> None:
    """Refuse a machine on which two ranks would be killed for memory."""
    if available_bytes < MEMORY_BYTES:
        raise CheckError(
            f"{available_bytes / GB:.1f} GB of memory are available, but the server needs "
            f"{MEMORY_BYTES // GB} GB: stop other programs, or use a larger machine"
        )


def check_port(host: str, port: int) -> None:
    """Refuse a port that the server could not open."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((host, port))
        except OSError as error:
            busy = error.errno == errno.EADDRINUSE
            why = "is in use by another program" if busy else f"cannot be opened ({error.strerror})"
            raise CheckError(
                f"port {port} on {host} {why}, but the server needs it: free it, or choose "
                "another one with --port"
            ) from error


def check_compiler(search_path: str | None = None) -> None:
    """Refuse a GPU machine without a C compiler: Triton builds its launchers with one."""
    if not any(shutil.which(name, path=search_path) for name in _COMPILERS):
        raise CheckError(
            f"no C compiler was found ({', '.join(_COMPILERS)}), but kernels are built at start-up "
            "on a GPU: install one (Debian and Ubuntu: apt-get install build-essential)"
        )


def num_gpus() -> int:
    """Return how many NVIDIA GPUs the driver lists; 0 without a driver."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU") for line in listing.stdout.splitlines())


def check_model(model: str | None, gpus: int) -> str | None:
    """Return the model to serve, a folder as an absolute path; None stands for the demo model."""
    if model is None:
        if gpus:
            raise CheckError(
                "no model was named, but on a GPU one is needed (the built-in demo model is "
                "for machines without): bash launch/serve.sh MODEL, a folder or a Hugging Face name"
            )
        return None
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    # A server on a CPU is offline, so there a name cannot be looked up.
    if not gpus or folder.exists() or model.startswith((".", "/", "~")):
        raise CheckError(
            f"{model} has no config.json, but the model must be a folder with one: check the path"
        )
    return model


def check_tp_size(tp_size: int, gpus: int, is_demo: bool) -> None:
    """Refuse a tensor-parallel size that this machine or model cannot have."""
    if gpus and not 1 <= tp_size <= gpus:
        raise CheckError(f"--tp is {tp_size}, but this machine has {gpus} GPUs: choose 1 to {gpus}")
    if is_demo and tp_size not in (1, 2, 4):
        raise CheckError(f"--tp is {tp_size}, but the demo model splits in 1, 2 or 4: choose these")
    if tp_size < 1:
        raise CheckError(f"--tp is {tp_size}, but at least 1 is needed: choose 1 or more")


if __name__ == "__main__":  # for setup.sh: python checks.py disk FOLDER
    _, _, _folder = sys.argv
    try:
        check_disk(Path(_folder), free_disk_bytes(Path(_folder)))
    except CheckError as _error:
        print(f"[setup] error: {_error}", file=sys.stderr)
        sys.exit(2)
