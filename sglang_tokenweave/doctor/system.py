"""Judge the operating system, the container, memory and the kernels' cache."""

from collections.abc import Iterator

from sglang_tokenweave.doctor.facts import Cache, Facts, Machine
from sglang_tokenweave.doctor.findings import Finding, finding

GIB = 2**30
MIB = 2**20
SHARED_MEMORY_BYTES = GIB  # Docker's 64 MiB are too few for the buffers of NCCL and SGLang
OPEN_FILES = 4096  # a server holds one for each connection, and one for each pair of ranks
RANK_BYTES = 4 * GIB  # of host memory that a rank's process takes while it loads a model
FREE_SHARE = 0.8  # of a GPU's memory; SGLang plans with nearly all of it
CACHE_BYTES = 100 * MIB  # a kernel takes 0.2 MB


def judge(facts: Facts) -> Iterator[Finding]:
    """Yield the findings on everything that is neither GPU nor Python package."""
    yield from _container(facts.machine)
    yield from _memory(facts)
    yield from _cache(facts.cache)


def _container(machine: Machine) -> Iterator[Finding]:
    if machine.exchange_problem:
        text = f"file descriptors cannot be passed between processes: {machine.exchange_problem}"
        yield finding("exchange-failed", text)
    else:
        where = {"": "no container", "container": "a container"}
        place = where.get(machine.container, f"a container ({machine.container})")
        yield finding("container", f"{place}; a file descriptor was passed over a socket")
    if machine.seccomp:
        yield finding("seccomp", "seccomp filters system calls here: pidfd_getfd may be refused")
    if machine.shm_bytes < SHARED_MEMORY_BYTES:
        free = machine.shm_bytes // MIB
        yield finding("shared-memory-small", f"{free} MiB are free in /dev/shm; 1 GiB is needed")
    if 0 <= machine.open_files < OPEN_FILES:
        yield finding("open-files-few", f"the limit of open files is {machine.open_files}")


def _memory(facts: Facts) -> Iterator[Finding]:
    host = facts.machine.memory_bytes
    boards = facts.boards
    free = [board.free_bytes / GIB for board in boards]
    shown = f", each GPU at least {min(free):.1f} GiB" if free else ""
    yield finding("memory", f"free: host {host / GIB:.1f} GiB{shown}")
    needed = RANK_BYTES * max(len(facts.gpus), 1)
    if host < needed:
        text = f"{host / GIB:.1f} GiB of host memory are available; ranks take {needed // GIB}"
        yield finding("host-memory-low", text)
    taken = {
        i: f"{(board.total_bytes - board.free_bytes) / GIB:.1f} GiB"
        for i, board in enumerate(boards)
        if board.free_bytes < FREE_SHARE * board.total_bytes
    }
    if taken:
        text = ", ".join(f"{size} of GPU {i}" for i, size in taken.items())
        yield finding("gpu-memory-low", f"already taken: {text}")


def _cache(cache: Cache) -> Iterator[Finding]:
    if cache.problem:
        where = cache.folder or "the cache of kernels"
        yield finding("cache-unusable", f"{where} cannot be used: {cache.problem}")
        return
    size = cache.num_bytes / MIB
    yield finding("cache", f"{cache.num_kernels} compiled kernels ({size:.1f} MiB), {cache.folder}")
    if cache.mode & 0o022:
        text = f"others may write to {cache.folder} (mode {cache.mode:o}), so it is not used"
        yield finding("cache-open", text)
    if cache.free_bytes < CACHE_BYTES:
        yield finding("cache-full", f"{cache.free_bytes // MIB} MiB are free for compiled kernels")
    if cache.is_volatile:
        yield finding("cache-volatile", f"{cache.folder} lies in the container's own layer")
