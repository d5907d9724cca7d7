"""The launcher without a server: every check says what came, what is needed, what to do."""

import fcntl
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from launch import checks, command, demo
from sglang_tokenweave import cpu
from sglang_tokenweave.config import TokenWeaveConfig, flag

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def busy_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def checkout(tmp_path):
    """A checkout without .venv, in a path with blanks, whose set-up must fail early."""
    root = tmp_path / "some folder" / "x"
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("demo_model"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def bash(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd="/",
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


# --- checks


def test_too_little_disk():
    with pytest.raises(checks.CheckError, match=r"5\.9 GB are free .* needs 6 GB: make room"):
        checks.check_disk(Path("/somewhere"), int(5.9e9))
    checks.check_disk(Path("/somewhere"), int(6e9))


def test_too_little_memory():
    with pytest.raises(checks.CheckError, match=r"3\.0 GB of memory .* needs 4 GB: stop other"):
        checks.check_memory(int(3e9))
    checks.check_memory(int(4e9))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", 8_000_000 * 1024), ("5000000000", 3_500_000_000), ("90000000000", 8_000_000 * 1024)],
)
def test_available_memory_respects_the_container(tmp_path, limit, expected):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("2000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1500000000\ninactive_file 500000000\n")
    assert checks.available_memory_bytes(meminfo, tmp_path) == expected
    assert checks.available_memory_bytes(meminfo, tmp_path / "none") == 8_000_000 * 1024


def test_busy_port(busy_port):
    with pytest.raises(checks.CheckError, match=rf"port {busy_port} on 127\.0\.0\.1 is in use"):
        checks.check_port("127.0.0.1", busy_port)


def test_address_of_another_machine():
    with pytest.raises(checks.CheckError, match="cannot be opened"):
        checks.check_port("192.0.2.1", 30000)


def test_missing_compiler(tmp_path):
    with pytest.raises(checks.CheckError, match="no C compiler was found"):
        checks.check_compiler(str(tmp_path))
    program(tmp_path / "gcc", "")
    checks.check_compiler(str(tmp_path))


def test_model(model, monkeypatch):
    assert checks.check_model(None, gpus=0) is None
    with pytest.raises(checks.CheckError, match="no model was named"):
        checks.check_model(None, gpus=2)
    monkeypatch.chdir(model.parent)
    assert checks.check_model("model", gpus=0) == str(model)
    assert checks.check_model("owner/name", gpus=2) == "owner/name"


@pytest.mark.parametrize(("name", "gpus"), [("owner/name", 0), ("./absent", 2), ("/", 2)])
def test_no_such_model(name, gpus):
    with pytest.raises(checks.CheckError, match=r"has no config\.json"):
        checks.check_model(name, gpus)


@pytest.mark.parametrize(
    ("tp_size", "gpus", "is_demo"), [(4, 2, False), (0, 2, False), (3, 0, True), (0, 0, False)]
)
def test_impossible_tp_size(tp_size, gpus, is_demo):
    with pytest.raises(checks.CheckError, match=f"--tp is {tp_size}, but"):
        checks.check_tp_size(tp_size, gpus, is_demo)


# --- from our command line to SGLang's


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "70000"], "--port is 70000; allowed: 1 to 65535"),
        (["--port", "x"], "invalid int value"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--", "--tp=4"], "--tp=4 stands after the --"),
        (["a", "b"], "unrecognized arguments: b"),
    ],
)
def test_bad_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_flags_after_the_dashes_reach_sglang_last():
    options = command.parse_arguments(["m", "--port", "31000", "--", "--dtype", "bfloat16"])
    on_cpu = command.server_command(options, "/a b/m", 4, gpus=0)
    assert on_cpu[1:5] == ["-m", "sglang_tokenweave.launch_server", "--model-path", "/a b/m"]
    assert on_cpu[-2:] == ["--dtype", "bfloat16"]
    assert on_cpu[on_cpu.index("--tp") + 1] == "4"
    assert "cpu" in on_cpu
    on_gpu = command.server_command(options, "m", 8, gpus=8)
    assert on_gpu[on_gpu.index("--tp") + 1] == "8"
    assert "cpu" not in on_gpu


def test_server_reaches_itself_past_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:3128")
    monkeypatch.setenv("NO_PROXY", "example.org")
    environment = command.server_environment(2, gpus=0, scratch="/scratch")
    assert environment["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert environment["no_proxy"] == "127.0.0.1,localhost"
    assert environment["TMPDIR"] == "/scratch"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
    ],
)
def test_loopback_url(host, url):
    assert command.loopback_url(host, 1) == url


def test_environment_of_a_cpu_server():
    environment = cpu.environment(4)
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    ranks = environment["SGLANG_CPU_OMP_THREADS_BIND"].split("|")
    cores = {int(core) for rank in ranks for core in rank.split(",")}
    assert len(ranks) == 4
    assert cores <= os.sched_getaffinity(0)
    with pytest.raises(ValueError, match="tp_size=0"):
        cpu.environment(0)


def test_arguments_of_a_cpu_server():
    arguments = cpu.server_arguments(2)
    assert dict(zip(arguments[::2], arguments[1::2], strict=True))["--tp"] == "2"
    assert arguments[arguments.index("--dtype") + 1] == "float32"


# --- the demo


def test_curl_line_survives_a_shell():
    line = demo.curl_line("http://127.0.0.1:1", Path("/some folder/it's/request.json"))
    shown = subprocess.run(
        ["bash", "-c", f'curl() {{ printf "%s\\n" "$@"; }}\n{line}'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == shlex.split(line)[1:]
    assert "@/some folder/it's/request.json" in shown.stdout.splitlines()


def test_demo_prompts_differ_and_are_long():
    first, second = demo.demo_request(1, demo.SHORT), demo.demo_request(2, demo.SHORT)
    assert first["text"] != second["text"]
    assert 1024 < len(first["text"].encode()) < 2048 - first["sampling_params"]["max_new_tokens"]
    assert len(demo.demo_request(1, demo.LONG)["text"]) > 4 * 1024


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (None, "says nothing"),
        ({"active": False, "reasons": ["TP is 1"]}, "runs stock: TP is 1"),
        (
            {
                "active": True,
                "transport": "reference",
                "batches": {"prefill": {"weave": 3}, "decode": {"weave": 1}},
            },
            "3 prefill, 1 decode (transport: reference)",
        ),
    ],
)
def test_describe_weaving(state, expected):
    info = {"internal_states": [{"tokenweave": state} if state else {}]}
    assert expected in demo.describe_weaving(info)


def test_no_server_is_not_healthy(busy_port):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert not demo.is_healthy(f"http://127.0.0.1:{free.getsockname()[1]}")


# --- the README


def test_readme_names_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"\]\(([\w./]+)\)", readme) + re.findall(r"bash (launch/\S+)", readme)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_lists_our_flags_with_their_defaults():
    rows = re.findall(r"^\| `(--\S+)` \| `?(\w+)`? \|", (ROOT / "README.md").read_text(), re.M)
    options = fields(TokenWeaveConfig)
    defaults = ["off" if each.default is False else str(each.default) or "none" for each in options]
    assert rows == list(zip([flag(each.name) for each in options], defaults, strict=True))


# --- the scripts


def test_serve_refuses_a_busy_port_before_the_set_up(checkout, busy_port, model):
    shutil.copytree(ROOT / "sglang_tokenweave", checkout / "sglang_tokenweave")
    serve = checkout / "launch" / "serve.sh"
    done = bash(serve, str(model), "--tp", "1", "--port", str(busy_port), PYTHON=sys.executable)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"[serve] error: port {busy_port} on 127.0.0.1 is in use")
    assert done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("script", ["serve.sh", "setup.sh"])
def test_no_python(checkout, script):
    done = bash(checkout / "launch" / script, PYTHON="/bin/false")
    assert done.returncode == 2
    assert "error: none of /bin/false is Python 3.11 or 3.12: install one" in done.stderr


@pytest.mark.parametrize("arguments", [["--overlay"], ["--overlay", "../x"], ["0.5.21"]])
def test_setup_refuses_bad_arguments(checkout, arguments):
    done = bash(checkout / "launch" / "setup.sh", *arguments)
    assert done.returncode == 2
    assert "allowed: --overlay SGLANG_VERSION" in done.stderr


def test_python_without_ensurepip(checkout, tmp_path):
    python = program(
        tmp_path / "python",
        f'case "$2" in *ensurepip*) exit 1 ;; esac; exec {shlex.quote(sys.executable)} "$@"',
    )
    done = bash(checkout / "launch" / "setup.sh", PYTHON=str(python))
    assert done.returncode == 2
    assert "has no venv or ensurepip module: install it" in done.stderr


def test_python_with_an_old_pip(checkout, tmp_path):
    python = program(
        tmp_path / "python",
        'if [[ $1 == -m ]]; then mkdir -p "$3/bin"; cp "$0.venv" "$3/bin/python"; exit; fi\n'
        f'exec {shlex.quote(sys.executable)} "$@"',
    )
    program(tmp_path / "python.venv", "echo 21.2.4")
    done = bash(checkout / "launch" / "setup.sh", PYTHON=str(python))
    assert done.returncode == 2
    assert "brings pip 21.2.4, but 22 is needed" in done.stderr
    assert (checkout / ".venv" / "unfinished").exists()


def test_setup_throws_away_what_an_interrupted_one_left(checkout):
    venv = checkout / ".venv"
    venv.mkdir()
    (venv / "unfinished").touch()
    (venv / "half a package").touch()
    bash(checkout / "launch" / "setup.sh", PYTHON="/bin/false")
    assert not venv.exists()


def test_two_set_ups_take_turns(checkout):
    (checkout / ".cache").mkdir()
    with (checkout / ".cache" / "setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            ["bash", str(checkout / "launch" / "setup.sh")],
            env={**os.environ, "PYTHON": "/bin/false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert "another set-up of this folder is running" in second.stdout.readline()
        assert second.poll() is None
    output, _ = second.communicate(timeout=30)
    assert "is Python 3.11 or 3.12" in output
