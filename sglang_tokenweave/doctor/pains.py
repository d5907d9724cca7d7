"""Fifteen pains that users of multi-GPU communication report, and what of ours tells of each.

Findings come from the machine (`findings`), `log-...` from a server's log (`logs`), `selftest-...`
from running the op. What TokenWeave does so that they do not happen is in docs/doctor.md.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pain:
    """A pain, and the ids of the findings that recognise it."""

    text: str
    findings: tuple[str, ...]


PAINS = {
    1: Pain(
        "the GPUs have multicast, but binding memory fails (CUDA 401, 1, 802)",
        ("multicast-unproven", "fabric-not-ready", "fabric-unhealthy", "log-multicast-bind"),
    ),
    2: Pain(
        "one rank fails and the others hang",
        ("log-rank-failed", "log-rank-late", "selftest-failed"),
    ),
    3: Pain(
        "the fabric manager stalls for a moment: 802 once, then it works",
        ("driver-not-ready", "log-fabric-starting"),
    ),
    4: Pain(
        "FABRIC handles without an IMEX channel in the container: not permitted",
        ("no-imex-channel", "log-no-imex-channel"),
    ),
    5: Pain("pidfd_getfd or ptrace refused by seccomp", ("seccomp", "log-ptrace")),
    6: Pain(
        "descriptors cannot be exchanged: no shared socket, or several hosts",
        ("exchange-failed", "log-exchange"),
    ),
    7: Pain(
        "no multicast though the links are fine (confidential computing, virtual machine, MIG)",
        ("multicast-unsupported", "mig", "log-no-multicast"),
    ),
    8: Pain(
        "no peer access at all: SIGFPE at the first request",
        ("no-peer-access", "log-no-peer-access"),
    ),
    9: Pain("two streams on one communicator wait for each other", ("log-streams-crossed",)),
    10: Pain("the ranks launch different grids", ("log-grids-differ",)),
    11: Pain("a rendezvous over all ranks instead of the group's", ("log-rendezvous",)),
    12: Pain(
        "symmetric buffers differ between ranks: garbage",
        ("log-pooled-memory", "log-outside-buffer", "selftest-wrong"),
    ),
    13: Pain("memory registered while a CUDA graph is captured", ("log-capture",)),
    14: Pain("wrong numbers: NaN rows, lost accuracy", ("log-nan", "selftest-wrong")),
    15: Pain(
        "slower, or no effect, and nobody says so",
        (
            "log-not-active",
            "log-silent",
            "log-never-woven",
            "no-nvlink",
            "selftest-slow",
        ),
    ),
}


def pains_of(name: str) -> list[int]:
    """Return the numbers of the pains that a finding tells of."""
    return [number for number, pain in PAINS.items() if name in pain.findings]
