"""The containers' files without running them: linted, resolved by Docker's own client, and safe."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import extract_key_values
from packaging.requirements import Requirement

from launch.docker import knobs
from sglang_tokenweave.compiler import default_cache

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "launch" / "docker" / "Dockerfile"
COMPOSE = ROOT / "launch" / "docker" / "compose.yaml"
BIN = Path(sys.prefix) / "bin"
GPU_PROFILES = {"gpu8": 8, "gpu2": 2}
# Beside our own: what SGLang's download of a model reads.
FOREIGN = {"HF_TOKEN"}


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def compose(profile: str, **environment: str) -> dict:
    """Resolve compose.yaml as `docker compose` would, against the schema it brings."""
    command = [BIN / "docker-compose", "-f", COMPOSE, "--profile", profile, "config"]
    done = run(*command, "--format", "json", **environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


def instructions(name: str) -> list[str]:
    return [
        each["value"]
        for each in DockerfileParser(str(DOCKERFILE)).structure
        if each["instruction"] == name
    ]


def test_the_dockerfile_is_clean() -> None:
    done = run(BIN / "hadolint", DOCKERFILE)
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM debian:latest\nRUN cd /tmp && sudo true\n")
    assert run(BIN / "hadolint", wrong).returncode == 1


def test_the_shell_scripts_are_clean() -> None:
    scripts = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/docker/steps/*.sh")]
    done = run(BIN / "shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *scripts)
    assert done.returncode == 0, done.stdout


def test_every_base_image_is_pinned_and_supported() -> None:
    pins = dict(each.split("=", 1) for each in instructions("ARG") if "_IMAGE=" in each)
    for image in pins.values():
        name, _, tag = image.partition(":")
        assert tag[:1].isdigit() or tag.startswith("v0."), f"{name} is not pinned to a release"
    version = pins["SGLANG_IMAGE"].partition(":v")[2].partition("-")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = map(Requirement, extras["optional-dependencies"]["gpu"])
    (supported,) = (each.specifier for each in requirements if each.name == "sglang")
    assert version in supported


def test_every_step_is_a_script() -> None:
    for step in instructions("RUN"):
        command = [word for word in step.split() if not word.startswith("--mount=")]
        assert command[0] in ("bash", "python3"), step
        assert (ROOT / "launch" / "docker" / command[1].lstrip("/")).is_file(), step


def test_the_image_does_not_run_as_root() -> None:
    assert instructions("USER") == ["10001:10001"]


def test_compiled_kernels_go_to_the_volume(monkeypatch) -> None:
    environment: dict[str, str] = {"DEVICE": "cuda"}
    for value in instructions("ENV"):
        pairs = extract_key_values(
            env_replace=True, args={}, envs={"PATH": "", **environment}, instruction_value=value
        )
        environment |= dict(pairs)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (volume,) = instructions("VOLUME")
    assert default_cache().is_relative_to(volume)


@pytest.mark.parametrize(("profile", "gpus"), GPU_PROFILES.items())
def test_compose_reserves_the_gpus_of_a_machine(profile: str, gpus: int) -> None:
    (service,) = compose(profile, MODEL="org/model")["services"].values()
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": gpus, "capabilities": ["gpu"]}
    assert service["environment"]["MODEL"] == "org/model"
    assert int(service["shm_size"]) >= 2**30
    assert service["ulimits"]["memlock"] == -1


@pytest.mark.parametrize("profile", [*GPU_PROFILES, "cpu"])
def test_compose_confines_each_service(profile: str) -> None:
    (service,) = compose(profile)["services"].values()
    assert "privileged" not in service
    assert "cap_add" not in service
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert {mount["target"] for mount in service["volumes"]} == {"/cache", "/models"}
    assert [port["host_ip"] for port in service["ports"]] == ["127.0.0.1"]
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize("profile", [*GPU_PROFILES, "cpu"])
def test_compose_passes_every_variable_on(profile: str) -> None:
    chosen_by_the_image = {"DEVICE"} | ({"MODEL"} if profile == "cpu" else set())
    names = {knob.name for knob in knobs.table()} - chosen_by_the_image
    (service,) = compose(profile)["services"].values()
    assert set(service["environment"]) - FOREIGN == names
    given = {name: f"value of {name}" for name in names - {"PORT"}}
    (service,) = compose(profile, **given)["services"].values()
    assert {name: service["environment"][name] for name in given} == given


def test_compose_publishes_the_port_that_the_server_listens_on() -> None:
    (service,) = compose("gpu8", PORT="31000", MODELS="/data", PUBLISH="0.0.0.0")[
        "services"
    ].values()
    (port,) = service["ports"]
    assert (port["target"], port["published"], port["host_ip"]) == (31000, "31000", "0.0.0.0")
    assert service["environment"]["PORT"] == "31000"
    assert "/data" in [mount["source"] for mount in service["volumes"]]


def test_compose_waits_longer_than_the_entrypoint_needs_to_stop() -> None:
    (service,) = compose("gpu8")["services"].values()
    assert service["stop_grace_period"] == "1m30s"
    (stop_s,) = (int(knob.default) for knob in knobs.table() if knob.name == "STOP_SECONDS")
    # ProcessGroup.stop: the program, then 5 s for what it left, then 10 s after SIGKILL.
    assert stop_s + 5 + 10 < 90


def test_docker_refuses_a_field_that_it_does_not_know(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("read_only: true", "readonly: true"))
    assert "readonly" in run(BIN / "docker-compose", "-f", wrong, "config", "-q").stderr
