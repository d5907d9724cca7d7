"""`python -m sglang_tokenweave.doctor` as a program: real runs, exit codes, JSON, its page."""

import io
import json
import re
import subprocess
import sys
import venv
from dataclasses import fields
from pathlib import Path

import pytest
from machines import facts

from sglang_tokenweave.doctor import __main__ as program
from sglang_tokenweave.doctor import checkup, logs, report, selftest
from sglang_tokenweave.doctor.facts import Facts
from sglang_tokenweave.doctor.findings import CATALOGUE
from sglang_tokenweave.doctor.pains import PAINS
from sglang_tokenweave.doctor.verdict import decide

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "doctor.md").read_text()
DOCTOR = ["-m", "sglang_tokenweave.doctor"]
on_a_cpu = pytest.mark.skipif(
    Path("/proc/driver/nvidia").exists(), reason="says what a machine without a GPU says"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return (exit code, output, errors) of a plain run, one with --json, and one of a Python
    without packages. At once: each imports SGLang.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    bare = [folder / "bin" / "python", *DOCTOR]
    commands = {
        "text": [sys.executable, *DOCTOR],
        "json": [sys.executable, *DOCTOR, "--json"],
        "bare": bare,
        "selftest": [*bare, "--selftest"],
    }
    pipe = subprocess.PIPE
    running = {
        name: subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
        for name, command in commands.items()
    }
    try:
        outputs = {name: process.communicate(timeout=150) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    return {name: (running[name].returncode, *outputs[name]) for name in running}


def ids(text):
    return re.findall(r"^(?:ok|note|warning|problem) +([a-z-]+):", text, re.MULTILINE)


@on_a_cpu
def test_a_machine_without_a_gpu(runs):
    code, output, errors = runs["text"]
    assert (code, errors) == (1, "")
    assert output.endswith("VERDICT CPU only: for tests, with transport reference\n")
    assert ids(output)[0] == "no-gpu"
    assert {"container", "memory", "versions", "seams"} < set(ids(output))
    assert not re.search("^problem", output, re.MULTILINE)
    assert len(output.splitlines()) < 20


@on_a_cpu
def test_json_says_the_same(runs):
    code, output, errors = runs["json"]
    assert (code, errors) == (1, "")
    found = json.loads(output)
    assert (found["format"], found["kind"]) == (1, "machine")
    assert [each["id"] for each in found["findings"]] == ids(runs["text"][1])
    assert found["verdict"]["can_weave"] is False
    assert found["facts"]["cuda"]["kind"] == "error"
    assert found["facts"]["sglang"] == {"num_hooks": 11, "missing": [], "partial": []}
    assert found["facts"].keys() == {field.name for field in fields(Facts)}
    assert found["selftest"] is None
    documented = PAGE.partition("## JSON")[2]
    for name in (*found, *found["facts"], *found["findings"][0], *found["verdict"]):
        assert f"`{name}`" in documented


@on_a_cpu
def test_a_python_without_any_package(runs):
    code, output, errors = runs["bare"]
    assert (code, errors) == (1, "")
    assert {"sglang-missing", "torch-missing", "plugin-not-loaded"} < set(ids(output))
    assert "VERDICT CPU only, and not even for tests: " in output


@on_a_cpu
def test_a_self_test_without_a_gpu_says_what_was_not_run(runs):
    code, output, errors = runs["selftest"]
    assert (code, errors) == (1, "")
    assert "selftest-not-run: the op was not run: no NVIDIA GPU" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["extra"],
        ["--selftest", "--selftest-multicast"],
        ["--selftest", "--log", "x"],
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2


def test_a_log_that_is_not_there(tmp_path, capsys):
    assert program.main(["--log", str(tmp_path / "none")]) == 2
    assert "none: No such file" in capsys.readouterr().err
    assert program.main(["--log", str(tmp_path)]) == 2


@pytest.mark.parametrize(("text", "code"), [("fine\n", 0), ("CUDA out of memory\n", 1)])
def test_logs_from_files_and_pipes(tmp_path, monkeypatch, capsys, text, code):
    log = tmp_path / "server.log"
    log.write_bytes(b"\xff\xfe not UTF-8\n" + text.encode())
    assert program.main(["--log", str(log)]) == code
    assert ("(line 2)" in capsys.readouterr().out) == bool(code)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert program.main(["--log", "-", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert [each["id"] for each in found["findings"]] == ["log-out-of-memory"] * code
    assert all(each["line"] == 1 for each in found["findings"])


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_multicast_that_is_switched_off_is_refused_before_anything_is_looked_at(
    monkeypatch, capsys, option
):
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "1")
    monkeypatch.setattr(checkup, "gather", None)  # would fail when called
    assert program.main(["--selftest-multicast", *option]) == 1
    output = capsys.readouterr().out
    assert "NVSHMEM_DISABLE_NVLS=1" in output
    if option:
        assert json.loads(output)["selftest"]["passed"] is False


@pytest.mark.parametrize("passed", [True, False])
def test_the_self_test_decides_over_the_exit_code(monkeypatch, capsys, passed):
    result = selftest.Result("peer", passed, ())
    monkeypatch.setattr(checkup, "gather", facts)
    monkeypatch.setattr(selftest, "run", lambda *arguments: result)
    assert program.main(["--selftest"]) == (0 if passed else 1)
    assert program.main([]) == 0  # this machine can weave
    assert "VERDICT can weave with --tokenweave-transport peer" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_accident(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("CUDA out of memory\n")
    command = f"{sys.executable} -m sglang_tokenweave.doctor --log {log} | true"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""


def test_the_page_has_each_finding_with_its_level_and_remedy():
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (.+?) \| (.+) \|$", PAGE, re.MULTILINE)
    documented = {name: (level, remedy) for name, level, _, remedy in rows}
    known = {name: (str(level), remedy or "-") for name, (level, remedy) in CATALOGUE.items()}
    known |= {name: (str(each.level), each.remedy) for name, each in logs.CATALOGUE.items()}
    assert documented == known
    assert len(rows) == len(documented)


def test_the_page_shows_what_a_healthy_machine_says():
    machine = facts()
    findings = checkup.judge(machine)
    lines = [*report.lines(findings), report.verdict_line(decide(machine, findings))]
    assert "\n".join(["```", *lines, "```"]) in PAGE


def test_the_page_has_each_pain():
    for number, pain in PAINS.items():
        findings = ", ".join(f"`{name}`" for name in pain.findings)
        assert f"| {number} | {pain.text} | {findings} |" in PAGE
