"""Write what was found: lines for people, or one JSON object for programs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from sglang_tokenweave import __version__
from sglang_tokenweave.doctor.facts import Facts
from sglang_tokenweave.doctor.findings import Finding, Level
from sglang_tokenweave.doctor.logs import Sighting
from sglang_tokenweave.doctor.pains import pains_of
from sglang_tokenweave.doctor.selftest import Result
from sglang_tokenweave.doctor.verdict import Verdict

FORMAT = 1  # of the JSON: it is raised when a field goes or changes its meaning


def lines(findings: Iterable[Finding]) -> Iterable[str]:
    """Yield a line for each finding, and one with its remedy where it needs one."""
    for found in findings:
        yield f"{found.level:8}{found.id}: {found.text}"
        if found.remedy and found.level is not Level.OK:
            yield f"{'':8}-> {found.remedy}"


def verdict_line(verdict: Verdict) -> str:
    """Return the last line of a report."""
    return f"VERDICT {verdict.text}"


def log_lines(name: str, sightings: Sequence[Sighting]) -> Iterable[str]:
    """Yield the lines on a server's log."""
    for sighting in sightings:
        first, *rest = lines([sighting.finding])
        pains = ", ".join(map(str, pains_of(sighting.finding.id)))
        known = f" [pain {pains}]" if pains else ""
        times = f", {sighting.count} times" if sighting.count > 1 else ""
        yield f"{first} (line {sighting.line}{times}){known}"
        yield from rest
    found = f"{len(sightings)} symptom(s)" if sightings else "nothing that the doctor knows"
    yield f"VERDICT {name}: {found}"


def machine_json(
    facts: Facts, findings: Sequence[Finding], verdict: Verdict, selftest: Result | None
) -> dict[str, Any]:
    """Return the object of `--json`."""
    return {
        **_header("machine"),
        "verdict": asdict(verdict),
        "findings": [_finding(found) for found in findings],
        "selftest": _selftest(selftest),
        "facts": asdict(facts),
    }


def refusal_json(result: Result) -> dict[str, Any]:
    """Return the object for a self-test that was refused before anything was looked at."""
    return {**_header("selftest"), "selftest": _selftest(result)}


def log_json(name: str, sightings: Sequence[Sighting]) -> dict[str, Any]:
    """Return the object of `--log FILE --json`."""
    return {
        **_header("log"),
        "log": name,
        "findings": [
            {**_finding(sighting.finding), "line": sighting.line, "count": sighting.count}
            for sighting in sightings
        ],
    }


def _header(kind: str) -> dict[str, Any]:
    return {"format": FORMAT, "kind": kind, "version": __version__}


def _finding(found: Finding) -> dict[str, Any]:
    return {**asdict(found), "pains": pains_of(found.id)}


def _selftest(result: Result | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {
        "transport": result.transport,
        "passed": result.passed,
        "findings": [_finding(found) for found in result.findings],
        "measured": list(result.measured),
    }
