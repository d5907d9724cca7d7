"""Run the tests that inject faults, and keep what they saw: docs/reliability.json.

`python docs/tools/reliability.py` runs all of them, the rare ones and 50 restarts too, 40 minutes
on two cores; with JUNIT_XML..., reports that pytest wrote with --junitxml, it only replaces what
the tests that ran in there saw, and drops tests that are gone. `generated.py` renders it into
docs/reliability.md, and with it every docs/reliability/*.json: an object with title, date, command,
commit, machine, columns, rows and notes.
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent))

import compatibility

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "reliability.json"
SECTIONS = ROOT / "docs" / "reliability"
TESTS = (
    "test_faults_fatal.py",
    "test_faults_recovered.py",
    "test_faults_neighbours.py",
    "test_faults_caches.py",
)
THOROUGH = {**compatibility.THOROUGH, "TOKENWEAVE_TEST_RESTARTS": "50"}
_ORDER = ("differential", "soak", "http", "numerics")  # others follow by name

Seen = dict[str, Any]  # a fault as tests/faults.py records it, with the outcome of its test


def record(reports: Sequence[Path]) -> dict[str, Any]:
    """Return what JUnit reports say of faults, with where and when they were made.

    Raises:
        SystemExit: a test failed before it could say which fault it injects.
    """
    suites = [suite for report in reports for suite in ElementTree.parse(report).iter("testsuite")]
    cases = [case for suite in suites for case in suite.iter("testcase")]
    return {
        "dates": sorted(suite.attrib["timestamp"][:10] for suite in suites),
        "python": platform.python_version(),
        "torch": version("torch"),
        "sglang": version("sglang"),
        "cores": len(os.sched_getaffinity(0)),
        "tests": {compatibility.name_of(case): seen for case in cases if (seen := _seen(case))},
    }


def _seen(case: ElementTree.Element) -> Seen | None:
    outcome = compatibility.outcome_of(case)
    if outcome == "skipped":
        return None
    for found in case.iter("property"):
        if found.attrib["name"] == "fault":
            return {**json.loads(found.attrib["value"]), "outcome": outcome}
    name = compatibility.name_of(case)
    if name.startswith("test_faults_") and outcome == "failed":
        raise SystemExit(
            f"{name} failed without naming its fault: see its report, and run it again"
        )
    return None


def parts() -> dict[str, str]:
    """Return the generated parts of the page, by name."""
    data = json.loads(DATA.read_text())
    dates = " to ".join(dict.fromkeys(data["dates"]))
    recorded = {name.partition("::")[0] + ".py" for name in data["tests"]}
    missing = ", ".join(f"`{name}`" for name in TESTS if name not in recorded)
    return {
        "faults-provenance": (
            f"Recorded {dates}: Python {data['python']}, torch {data['torch']}, "
            f"SGLang {data['sglang']}, {data['cores']} cores, {len(data['tests'])} tests on CPUs."
            + (f" Not recorded yet: {missing}." if missing else "")
        ),
        "faults": faults(data["tests"].values()),
        "sections": "\n\n".join(section(json.loads(path.read_text())) for path in _sections()),
    }


def faults(tests: Sequence[Seen]) -> str:
    """Return the table of faults: one row for each fault and place."""
    rows = []
    for seen in tests:
        survived = seen["injected"] if seen["outcome"] == "passed" else 0
        seconds = "" if seen["seconds"] is None else f"{seen['seconds']:.1f} s"
        leaks = "not looked" if seen["leaks"] is None else seen["leaks"]
        cells = [seen["name"], seen["where"], seen["injected"], _of(survived, seen["injected"])]
        rows.append([*cells, seconds, seen["sees"], leaks])
    heads = ["fault", "where", "injected", "survived as specified", "worst time"]
    return compatibility.table(
        [*heads, "what the user sees", "leaks"], sorted(rows, key=lambda row: row[0])
    )


def _of(survived: int, injected: int) -> str:
    return str(survived) if survived == injected else f"**{survived} of {injected}**"


def _sections() -> list[Path]:
    def place(path: Path) -> tuple[int, str]:
        known = path.stem in _ORDER
        return (_ORDER.index(path.stem) if known else len(_ORDER), path.stem)

    return sorted(SECTIONS.glob("*.json"), key=place)


def section(data: dict[str, Any]) -> str:
    """Return a section of the page: its title, where its figures come from, the figures, notes."""
    origin = f"{data['date']}, commit {data['commit']}, {data['machine']}: `{data['command']}`"
    notes = "\n".join(f"- {note}" for note in data["notes"])
    blocks = [
        f"## {data['title']}",
        origin,
        compatibility.table(data["columns"], data["rows"]),
        notes,
    ]
    return "\n\n".join(block for block in blocks if block)


def existing_tests() -> set[str]:
    """Return the names of these tests as pytest collects them now."""
    return compatibility.existing_tests(TESTS, THOROUGH)


def main(argv: list[str]) -> None:
    """Record a new run, or bring the record up to date with the reports of some tests."""
    if argv:
        now = record([Path(name) for name in argv])
        before = json.loads(DATA.read_text()) if DATA.exists() else {"dates": [], "tests": {}}
        now = compatibility.update(before, now, existing_tests(), key="tests")
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            compatibility.run_tests(report, TESTS, THOROUGH)
            now = record([report])
    DATA.write_text(json.dumps(now, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
