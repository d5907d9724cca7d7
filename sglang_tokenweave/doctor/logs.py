"""Read a server's log and name the troubles in it, of ours and of the libraries below us."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sglang_tokenweave.doctor.findings import Finding, Level


@dataclass(frozen=True)
class Symptom:
    """What a line of a log looks like, what it means, and what to do."""

    id: str
    level: Level
    pattern: str  # a regular expression; "": found by looking at the whole log
    text: str
    remedy: str


_FABRIC_MANAGER = (
    "restart nvidia-fabricmanager on the host and reset the GPUs (or reboot); until then "
    "NCCL_NVLS_ENABLE=0 keeps everybody, us too, off multicast"
)

SYMPTOMS = (
    Symptom(
        "log-multicast-bind",
        Level.PROBLEM,
        r"cuMulticast\w+: CUDA_ERROR_(?!SYSTEM_NOT_READY|NOT_SUPPORTED|NOT_PERMITTED)"
        r"|bind NVLink SHARP|nvls\.cc:\d+ NCCL WARN Cuda failure (?!802)",
        "multicast memory could not be bound although the GPUs have multicast",
        _FABRIC_MANAGER,
    ),
    Symptom(
        "log-rank-failed",
        Level.PROBLEM,
        r"DisagreementError|\w failed on rank \d+: |does not reach all other ranks",
        "a step failed on one rank, so all ranks gave it up together",
        "the line names the step, the ranks and their errors: look the error up",
    ),
    Symptom(
        "log-fabric-starting",
        Level.PROBLEM,
        r"CUDA_ERROR_SYSTEM_NOT_READY|(?:Cuda failure|CUDA error) 802|system not yet initialized",
        "the fabric manager was not ready (CUDA 802): still starting, stalled, or not running",
        "start the server again; if it stays: systemctl status nvidia-fabricmanager on the host",
    ),
    Symptom(
        "log-no-imex-channel",
        Level.PROBLEM,
        r"CUDA_ERROR_NOT_PERMITTED|cuMemCreate failed: (?:800|operation not permitted)"
        r"|nvidia-caps-imex-channels|No such device channel",
        "FABRIC handles were asked for without an IMEX channel in this container",
        "on one machine ask for file descriptors; else pass /dev/nvidia-caps-imex-channels through",
    ),
    Symptom(
        "log-ptrace",
        Level.PROBLEM,
        r"pidfd_(?:getfd|open)",
        "a library takes descriptors from other processes, which seccomp or ptrace rules refuse",
        "TokenWeave does not do so; for the library: docker run --cap-add SYS_PTRACE",
    ),
    Symptom(
        "log-exchange",
        Level.PROBLEM,
        r"exchanged no descriptors with rank|its descriptor did not arrive|run on several hosts",
        "ranks could not pass file descriptors to each other",
        "all ranks on one host, in one container, as one user; else see why the named rank failed",
    ),
    Symptom(
        "log-no-multicast",
        Level.NOTE,
        r"multicast operations are not supported|cuMulticast\w+: CUDA_ERROR_NOT_SUPPORTED"
        r"|NVLS multicast support is not available",
        "no multicast on these GPUs (no NVSwitch, confidential computing, MIG, vGPU)",
        "nothing to do for `peer`; SGLang's --enable-torch-symm-mem switches itself off",
    ),
    Symptom(
        "log-multicast-off",
        Level.NOTE,
        r"forbids multicast|NCCL_NVLS_ENABLE set by environment to 0",
        "multicast is off because the operator's environment says so",
        "unset the variable to allow multicast; `peer` needs none",
    ),
    Symptom(
        "log-no-peer-access",
        Level.PROBLEM,
        r"SIGFPE|Floating point exception|CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"
        r"|peer access is not supported between|has no peer access to|exit ?code:? -8\b",
        "GPUs without peer access were asked to share memory",
        "run the doctor on the machine: it names the pairs; serve there with stock SGLang",
    ),
    Symptom(
        "log-rendezvous",
        Level.PROBLEM,
        r"Timed out after \d+ seconds waiting for clients|client socket has timed out"
        r"|DistStoreError|wait timeout after \d+ ?ms|monitoredBarrier",
        "ranks waited for others that never came: a group larger than the ranks that entered it",
        "give data and pipeline parallel replicas groups of their own; see why a rank is missing",
    ),
    Symptom(
        "log-pooled-memory",
        Level.NOTE,
        r"enable_symm_mem=True|--enable-symm-mem\b",
        "SGLang's pooled symmetric memory is on; its buffers once differed between ranks",
        "TokenWeave has a buffer of its own; if answers are garbage, leave --enable-symm-mem out",
    ),
    Symptom(
        "log-outside-buffer",
        Level.PROBLEM,
        r"rows \d+:\d+ are outside the buffer",
        "a batch was placed outside the symmetric buffer, which is laid out by arithmetic",
        "report it with the log and the server's flags",
    ),
    Symptom(
        "log-capture",
        Level.PROBLEM,
        r"CUDA_ERROR_STREAM_CAPTURE_\w+|cudaErrorStreamCapture\w+|when stream is capturing",
        "something allocated or synchronised while a CUDA graph was being captured",
        "report it with the log; --disable-cuda-graph gets past it, slowly",
    ),
    Symptom(
        "log-nan",
        Level.PROBLEM,
        r"NaN detected in|NaN in the logits|Detected errors during sampling",
        "NaN in the activations",
        "serve without TokenWeave: if they stay, it is the model; else report them, and --selftest",
    ),
    Symptom(
        "log-not-active",
        Level.WARNING,
        r"TokenWeave is NOT active|TokenWeave is strict and cannot be active",
        "TokenWeave was switched on but the server runs stock",
        "the line says why; --tokenweave-strict turns it into an error",
    ),
    Symptom(
        "log-hook-missing",
        Level.PROBLEM,
        r"the hook on \S+ did not take|SGLang has no \S+ \(|, expected \(.*\) first, needed to",
        "this SGLang lacks something that TokenWeave calls or is called by",
        "use SGLang 0.5.17 to 0.5.23, and no other patches of it",
    ),
    Symptom(
        "log-compile",
        Level.PROBLEM,
        r"CompileError|kernels are compiled (?:with NVRTC|through the package)",
        "a kernel could not be compiled",
        "run the doctor on the machine; pip install 'nvidia-cuda-nvrtc>=13,<14'",
    ),
    Symptom(
        "log-out-of-memory",
        Level.PROBLEM,
        r"CUDA_ERROR_OUT_OF_MEMORY|CUDA out of memory",
        "a GPU's memory ran out",
        "lower --mem-fraction-static, or --chunked-prefill-size, which sizes our buffer",
    ),
    Symptom(
        "log-rank-late",
        Level.PROBLEM,
        "",
        "a rank never came where others waited on the device: it failed or hangs",
        "look in its log for what came before; the ranks that waited have stopped themselves",
    ),
    Symptom(
        "log-streams-crossed",
        Level.PROBLEM,
        "",
        "ranks waited for each other on the device: two communications met in different orders",
        "report it with the log, and serve with stock SGLang meanwhile",
    ),
    Symptom(
        "log-grids-differ",
        Level.PROBLEM,
        "",
        "only the later thread blocks waited: the ranks launched different numbers of them",
        "give all ranks the same flags, tables and environment; report it if they have",
    ),
    Symptom(
        "log-silent",
        Level.WARNING,
        "",
        "an SGLang server's log without a word of TokenWeave: it was not loaded or not switched on",
        "add --enable-tokenweave, or start sglang_tokenweave.launch_server; check SGLANG_PLUGINS",
    ),
    Symptom(
        "log-never-woven",
        Level.NOTE,
        "",
        "TokenWeave is active, but all batches ran stock",
        "batches are smaller than --tokenweave-min-tokens, or fell back: /server_info counts both",
    ),
)
CATALOGUE = {symptom.id: symptom for symptom in SYMPTOMS}

_PATTERNS = [(symptom.id, re.compile(symptom.pattern)) for symptom in SYMPTOMS if symptom.pattern]
_WAIT = re.compile(r"tokenweave: rank (\d+), CTA (\d{1,9}) waited \d+ ms for rank (\d+)\b")
_STREAM_WAIT = re.compile(r"tokenweave: rank (\d+).*a stream has waited")
_STREAM_PEER = re.compile(r"rank (\d+)'s: expected")
_LONGEST = 10_000  # characters of a line that are read: some patterns take the square of it
_COUNTS = re.compile(r"TokenWeave after \d+ batches: (.*)")


@dataclass(frozen=True)
class Sighting:
    """A symptom that a log shows, where first, and how often."""

    finding: Finding
    line: int  # from 1
    count: int


@dataclass
class _Log:
    first: dict[str, int] = field(default_factory=dict)  # symptom -> line
    counts: dict[str, int] = field(default_factory=dict)
    excerpts: dict[str, str] = field(default_factory=dict)
    waits: dict[tuple[str, str], set[int]] = field(default_factory=dict)  # (rank, peer) -> CTAs
    wait_line: int = 0
    has_server: bool = False
    has_us: bool = False
    last_counts: str = ""
    last_counts_line: int = 0
    num_lines: int = 0


def read(lines: Iterable[str]) -> list[Sighting]:
    """Return the symptoms in a log, in order of appearance."""
    log = _Log()
    for line in lines:
        log.num_lines += 1
        _note(log, line[:_LONGEST])
    computed = _of_the_whole(log)
    sightings = [
        *(_sighting(name, log, line, log.excerpts[name]) for name, line in log.first.items()),
        *(_sighting(name, log, line, detail) for name, line, detail in computed),
    ]
    return sorted(sightings, key=lambda sighting: sighting.line)


def _note(log: _Log, line: str) -> None:
    for name, pattern in _PATTERNS:
        if pattern.search(line):
            log.first.setdefault(name, log.num_lines)
            log.excerpts.setdefault(name, _plain(line.strip()[-300:]))
            log.counts[name] = log.counts.get(name, 0) + 1
    for rank, peer, cta in _waits(line):
        log.waits.setdefault((rank, peer), set()).add(cta)
        log.wait_line = log.wait_line or log.num_lines
    if counts := _COUNTS.search(line):
        log.last_counts, log.last_counts_line = counts[1], log.num_lines
    log.has_server |= "server_args=" in line or "fired up and ready" in line
    log.has_us |= "tokenweave" in line.lower()


def _plain(text: str) -> str:
    """Return a text fit for a terminal: a log holds what clients sent, terminal escapes, too."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _waits(line: str) -> Iterator[tuple[str, str, int]]:
    if wait := _WAIT.search(line):
        yield wait[1], wait[3], int(wait[2])
    elif wait := _STREAM_WAIT.search(line):  # of copy engines, which have no thread blocks
        for peer in _STREAM_PEER.findall(line):
            yield wait[1], peer, 0


def _of_the_whole(log: _Log) -> Iterator[tuple[str, int, str]]:
    if log.waits:
        yield (_why_waited(log.waits), log.wait_line, _who_waited(log.waits))
    if log.has_server and not log.has_us:
        yield "log-silent", log.num_lines, ""
    plans = log.last_counts.partition(";")[0]
    if plans and " weave " not in plans and " fuse " not in plans:
        yield "log-never-woven", log.last_counts_line, _plain(log.last_counts)


def _why_waited(waits: dict[tuple[str, str], set[int]]) -> str:
    # A block waits for its like on the other rank: where block 0 met and block 8 did not, the other
    # rank has no block 8.
    if all(min(ctas) > 0 for ctas in waits.values()):
        return "log-grids-differ"
    if any((peer, rank) in waits for rank, peer in waits):
        return "log-streams-crossed"
    return "log-rank-late"


def _who_waited(waits: dict[tuple[str, str], set[int]]) -> str:
    return ", ".join(
        f"rank {rank} for rank {peer} (CTAs {min(ctas)} to {max(ctas)})"
        for (rank, peer), ctas in sorted(waits.items())
    )


def _sighting(name: str, log: _Log, line: int, detail: str) -> Sighting:
    symptom = CATALOGUE[name]
    text = f"{symptom.text}: {detail}" if detail else symptom.text
    found = Finding(name, symptom.level, text, symptom.remedy)
    return Sighting(found, line, log.counts.get(name, 1))
