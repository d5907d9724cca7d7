"""One sentence on a machine: can it weave, with which transport, or why not."""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_tokenweave.doctor.facts import Facts
from sglang_tokenweave.doctor.findings import Finding, Level


@dataclass(frozen=True)
class Verdict:
    """What a server on this machine would do."""

    can_weave: bool
    transport: str | None  # that it would use; None: it runs stock
    text: str


def decide(facts: Facts, findings: Sequence[Finding]) -> Verdict:
    """Sum up what was found.

    Of device transports, `peer` is named unless there are more than two GPUs with multicast that
    nothing speaks against: at two, unicast moves fewer bytes.
    """
    problems = [found for found in findings if found.level is Level.PROBLEM]
    if not facts.has_nvidia:
        return _on_cpu(problems)
    if problems:
        why = "; ".join(found.text for found in problems)
        return Verdict(False, None, f"runs stock because {why}")
    transport = _preferred(facts, findings)
    return Verdict(True, transport, f"can weave with --tokenweave-transport {transport}")


def _on_cpu(problems: Sequence[Finding]) -> Verdict:
    if problems:
        why = "; ".join(found.text for found in problems)
        return Verdict(False, None, f"CPU only, and not even for tests: {why}")
    return Verdict(False, "reference", "CPU only: for tests, with transport reference")


def _preferred(facts: Facts, findings: Sequence[Finding]) -> str:
    ids = {found.id for found in findings}
    is_clear = "multicast-unproven" in ids and not {"fabric-not-ready", "fabric-differs"} & ids
    return "multicast" if is_clear and len(facts.gpus) > 2 else "peer"
