"""Run the tests that decide what is supported, and keep their outcomes: docs/compatibility.json.

`python docs/tools/compatibility.py` runs all of them, half an hour on two cores; with JUNIT_XML...,
reports that pytest wrote with --junitxml, it only replaces the outcomes of the tests in there, and
drops tests that are gone. `generated.py` renders the outcomes into docs/compatibility.md.
"""

import ast
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "compatibility.json"
TESTS = (
    "test_equality.py",
    "test_versions.py",
    "test_pipeline.py",
    "test_refusals.py",
    "test_refusals_server.py",
)
THOROUGH = {"TOKENWEAVE_TEST": "all"}  # tests/thorough.py
_MODELS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
}
_VARIANTS = {
    "llama-mixed": "Llama, prefill and decode in one batch (`--enable-mixed-chunk`)",
    "llama-fuse": "Llama, unsplit through the fused op (`--tokenweave-fuse-min-tokens`)",
    "llama-tp4": "Llama, TP=4",
    "mixtral-fuse": "Mixtral, unsplit through the fused op",
}

Outcomes = dict[str, str]  # test to "passed", "failed" or "skipped"


def record(reports: Sequence[Path]) -> dict[str, Any]:
    """Return what JUnit reports say of these tests, with where and when they were made."""
    suites = [suite for report in reports for suite in ElementTree.parse(report).iter("testsuite")]
    found = {name_of(case): outcome_of(case) for suite in suites for case in suite.iter("testcase")}
    ours = tuple(f"{name.removesuffix('.py')}::" for name in TESTS)
    return {
        "dates": sorted(suite.attrib["timestamp"][:10] for suite in suites),
        "python": platform.python_version(),
        "torch": version("torch"),
        "sglang": version("sglang"),
        "outcomes": {name: found[name] for name in found if name.startswith(ours)},
    }


def update(
    before: dict[str, Any], now: dict[str, Any], exist: set[str], key: str = "outcomes"
) -> dict[str, Any]:
    """Return the outcomes of `before` with those of `now` in their place, of tests that exist."""
    outcomes = {**before[key], **now[key]}
    dates = sorted({*before["dates"], *now["dates"]})
    kept = {name: outcome for name, outcome in outcomes.items() if name in exist}
    return {**now, "dates": [dates[0], dates[-1]], key: kept}


def existing_tests(
    tests: Sequence[str] = TESTS, environment: Mapping[str, str] = THOROUGH
) -> set[str]:
    """Return the names of these tests as pytest collects them now."""
    files = [str(ROOT / "tests" / name) for name in tests]
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *files],
        cwd=ROOT,
        env={**environment, **os.environ},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"^tests/(\w+)\.py(::.+)$", listed.stdout, re.MULTILINE)
    return {file + name for file, name in found}


def run_tests(
    report: Path, tests: Sequence[str] = TESTS, environment: Mapping[str, str] = THOROUGH
) -> None:
    """Run the tests; failed ones are part of the result."""
    files = [str(ROOT / "tests" / name) for name in tests]
    command = [sys.executable, "-m", "pytest", *files, f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, env={**environment, **os.environ}, check=False)


def name_of(case: ElementTree.Element) -> str:
    """Return the name of a test in a JUnit report, as `existing_tests` does."""
    return f"{case.attrib['classname'].removeprefix('tests.')}::{case.attrib['name']}"


def outcome_of(case: ElementTree.Element) -> str:
    """Return "passed", "failed" or "skipped"."""
    problems = {child.tag for child in case} & {"failure", "error", "skipped"}
    if not problems:
        return "passed"
    return "skipped" if problems == {"skipped"} else "failed"


def parts() -> dict[str, str]:
    """Return the generated parts of the page, by name."""
    data = json.loads(DATA.read_text())
    outcomes = data["outcomes"]
    return {
        "provenance": (
            f"Recorded {' to '.join(dict.fromkeys(data['dates']))}: Python {data['python']}, "
            f"torch {data['torch']}, {len(outcomes)} tests on CPUs."
        ),
        "models": _models(outcomes, data["sglang"]),
        "features": _features(outcomes),
        "variants": _variants(outcomes),
        "refusals": _refusals(outcomes),
    }


def _models(outcomes: Outcomes, newest: str) -> str:
    others = sorted({release for release, _ in _by_release(outcomes)})
    rows = []
    for name, title in _MODELS.items():
        cells = [_verdict(_by_release(outcomes).get((each, name), ())) for each in others]
        rows.append([title, *cells, _verdict(_equality(outcomes, name).values())])
    return table(["model", *(f"SGLang {each}" for each in (*others, newest))], rows)


def _features(outcomes: Outcomes) -> str:
    by_model = {name: _equality(outcomes, name) for name in _MODELS}
    rows = [
        [text, *(_verdict([found[work]] if work in found else ()) for found in by_model.values())]
        for work, text in _workloads().items()
    ]
    return table(["what is asked", *_MODELS.values()], rows)


def _variants(outcomes: Outcomes) -> str:
    rows = [
        [text, _verdict(_equality(outcomes, name).values())] for name, text in _VARIANTS.items()
    ]
    for name, outcome in outcomes.items():
        pipeline = re.fullmatch(r"test_pipeline::test_equals_stock\[(.+)\]", name)
        if pipeline:
            rows.append([f"two pipeline stages, TP=2 each: {pipeline[1]}", _verdict([outcome])])
    return table(["server", "equals stock"], rows)


def _refusals(outcomes: Outcomes) -> str:
    pattern = re.compile(r"test_refusals_server::test_(runs_stock|stops)\w*\[(.+)\]")
    found = {match: outcomes[name] for name in outcomes if (match := pattern.fullmatch(name))}
    done = {"runs_stock": "serves as stock and says why", "stops": "stops under strict"}
    rows = [[match[2], done[match[1]], _verdict([result])] for match, result in found.items()]
    return table(["server with", "what it does", "seen"], rows)


def _equality(outcomes: Outcomes, setup: str) -> Outcomes:
    """Return the outcomes of a setup of tests/test_equality.py by workload."""
    found = {}
    for name, result in outcomes.items():
        arguments = re.fullmatch(r"test_equality::test_equals_stock\[(.+)\]", name)
        for work in _workloads():
            if arguments and arguments[1] in (f"{setup}-{work}", f"{work}-{setup}"):
                found[work] = result
    return found


def _by_release(outcomes: Outcomes) -> dict[tuple[str, str], list[str]]:
    """Return the outcomes of tests/test_versions.py by release and model."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, result in outcomes.items():
        arguments = re.fullmatch(r"test_versions::test_equals_stock\[(.+)\]", name)
        if arguments:
            release = next(part for part in arguments[1].split("-") if part[0].isdigit())
            model = next(part for part in arguments[1].split("-") if not part[0].isdigit())
            found.setdefault((release, model), []).append(result)
    return found


@cache
def _workloads() -> dict[str, str]:
    """Return the first sentence that each workload says of itself."""
    tree = ast.parse((ROOT / "tests" / "workloads.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    (table,) = (node for node in tree.body if _is_table(node))
    names = [node.id for node in ast.walk(table) if isinstance(node, ast.Name)]
    texts = {name: ast.get_docstring(functions[name]) for name in names if name in functions}
    return {name: (text or name).partition(".\n")[0].rstrip(".") for name, text in texts.items()}


def _is_table(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "WORKLOADS"


def _verdict(results: Iterable[str]) -> str:
    results = list(results)
    if not results:
        return "not run"
    failed = len(results) - results.count("passed")
    return f"**{failed} of {len(results)} failed**" if failed else "yes"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def main(argv: list[str]) -> None:
    """Record a new run, or bring the record up to date with the reports of some tests."""
    if argv:
        before = json.loads(DATA.read_text())
        recorded = update(before, record([Path(name) for name in argv]), existing_tests())
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            run_tests(report)
            recorded = record([report])
    DATA.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
