"""What the processes of a server hold: memory, descriptors, threads, shared memory."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from server import Server


@dataclass(frozen=True)
class Footprint:
    """By process, named by what it does; `shared_files` are in /dev/shm, of all of them."""

    memory_bytes: dict[str, int]
    descriptors: dict[str, int]  # without those of connections that are open on both ends
    threads: dict[str, int]
    cpu_s: dict[str, float]
    shared_files: int

    def series(self) -> dict[str, float]:
        """Return all figures by name."""
        named = {
            "memory": self.memory_bytes,
            "descriptors": self.descriptors,
            "threads": self.threads,
        }
        flat = {f"{what} {who}": n for what, by in named.items() for who, n in by.items()}
        return {**flat, "files in /dev/shm": self.shared_files}


def measure(server: Server) -> Footprint:
    """Look at every process of the server's session now."""
    processes = {}
    for pid in server.processes():
        process = psutil.Process(pid)
        with process.oneshot():
            processes[_role(server, process)] = (
                _memory_bytes(pid),
                process.num_fds() - _count_clients(process),
                process.num_threads(),
                sum(process.cpu_times()[:2]),
            )
    columns = zip(*processes.values(), strict=True)
    by_role = [dict(zip(processes, column, strict=True)) for column in columns]
    return Footprint(*by_role, shared_files=_count_shared_files(server))


def _memory_bytes(pid: int) -> int:
    """Return the memory that is no file's; of what several processes share, each has its part.

    Not PSS as a whole: the part of a library's pages falls when any other program maps it, too.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
    return 1024 * (int(sizes["Pss_Anon"]) + int(sizes["Pss_Shmem"]))


def _count_clients(process: psutil.Process) -> int:
    connections = process.net_connections("tcp4")
    return sum(each.status == psutil.CONN_ESTABLISHED for each in connections)


def _role(server: Server, process: psutil.Process) -> str:
    if process.pid == server.process.pid:
        return "HTTP server"
    title = " ".join(process.cmdline()).strip("\0 ")
    if "resource_tracker" in title:
        return "resource tracker"
    return title.removeprefix("sglang::") if title.startswith("sglang::") else f"{process.pid}"


def _count_shared_files(server: Server) -> int:
    """Count what exists of all that the server had open at any look, or that bears its numbers."""
    server.note_shared_memory()
    pids = [str(pid) for pid in server.processes()]
    names = {path.name for path in Path("/dev/shm").iterdir()}
    numbered = {name for name in names if any(pid in name for pid in pids)}
    return len(names & (server.shared_memory | numbered))


def gpu_memory() -> dict[str, float]:
    """Return the bytes in use on each GPU, of all processes."""
    found = {}
    for device in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(device)
        found[f"memory GPU {device}"] = float(total - free)
    return found
