"""Both images built in a clean root, step by step as the Dockerfile has them, and the demo served.

There is no container engine here. The base of the CPU image is Debian's own Python; the base of the
GPU image cannot be had, so SGLang for a CPU and the CUDA compiler stand in for it.
"""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import clean_root
import psutil
import pytest
from dockerfile import Build, Image
from sandbox import Bind, Sandbox

from launch import demo

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(1500)]

START_DEADLINE_S = 240
STOP_DEADLINE_S = 60
USER = 10001
MB = 10**6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    clean_root.require()
    folder = tmp_path_factory.mktemp("images")
    yield folder
    shutil.rmtree(folder)  # gigabytes


@pytest.fixture(scope="module")
def python(folder: Path) -> Image:
    return clean_root.debian(folder)


@pytest.fixture(scope="module")
def cpu_build(folder: Path, python: Image) -> Build:
    return clean_root.image_build(folder / "cpu", "cpu", {"python": python})


@pytest.fixture(scope="module")
def cpu(cpu_build: Build) -> Image:
    return cpu_build.stage("server")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Return a new volume as an engine makes it: with the owner that the image's folder has."""
    volume = tmp_path / "volume"
    volume.mkdir()
    shutil.chown(volume, USER, USER)
    return volume


@dataclass
class Container:
    """A running container: read-only root, no capabilities, its first process is process 1."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, image: Image, volume: Path, folder: Path, **environment: str) -> "Container":
        log = folder / "log"
        root = folder / "root"
        root.mkdir()
        sandbox = Sandbox(
            image.layers, None, [Bind(volume, "/cache", writable=True)], image.user, image.workdir
        )
        command = sandbox.command(root, image.entrypoint, {**image.environment, **environment})
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        return cls(process, log)

    @property
    def first(self) -> psutil.Process:
        """The container's process 1, as this machine sees it."""
        for child in psutil.Process(self.process.pid).children():
            return child
        raise AssertionError(f"the container does not run:\n{self.text()[-6000:]}")

    def kill(self) -> None:
        """End all of it, if it still runs: with process 1 go the others."""
        # Whoever started process 1 cannot take it along: it has become another user's.
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                child.kill()
        self.process.kill()
        self.process.wait()

    def health(self, command: list[str]) -> int:
        """Run the image's health check inside, as an engine does."""
        inside = ["nsenter", "--target", str(self.first.pid), "--mount", "--pid", "--root"]
        user = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"]
        variables = [f"{name}={value}" for name, value in self.first.environ().items()]
        return subprocess.run(
            [*inside, *user, "env", "-i", *variables, *command], timeout=60
        ).returncode

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def test_every_step_of_the_cpu_image_runs(cpu: Image) -> None:
    assert cpu.user == f"{USER}:{USER}"
    assert cpu.volumes == (cpu.environment["HOME"],)


def test_layers_other_than_the_packages_are_small(cpu: Image) -> None:
    sizes = sorted(
        sum(path.lstat().st_size for path in layer.rglob("*") if path.is_file())
        for layer in cpu.layers
    )
    # The two largest: SGLang's packages, and the base.
    assert all(size < 40 * MB for size in sizes[:-2]), [size // MB for size in sizes]


def test_nothing_of_the_build_stays(cpu: Image) -> None:
    for layer in cpu.layers[:-1]:
        left = [name for name in ("steps", "src", "wheels") if (layer / name).exists()]
        assert not left
        assert not list(layer.glob("root/.cache/*")), layer
        assert not list(layer.glob("tmp/*")), layer


def test_the_cpu_image_serves_the_demo_and_stops(cpu: Image, volume: Path, tmp_path: Path) -> None:
    port = free_port()
    container = Container.start(cpu, volume, tmp_path, PORT=str(port), EXTRA_ARGS="--sleep-on-idle")
    try:
        wait_until_healthy(container, list(cpu.healthcheck))
        check_confinement(container.first)
        url = f"http://127.0.0.1:{port}"
        answer = demo.post_json(f"{url}/generate", demo.demo_request(seed=1, length=demo.SHORT))
        assert answer["meta_info"]["completion_tokens"] > 0
        state = demo.get_json(f"{url}/server_info")["internal_states"][0]["tokenweave"]
        assert state["active"], state
        assert state["batches"]["prefill"]["weave"] > 0, state
        inside = container.first.children(recursive=True)
        container.first.send_signal(signal.SIGTERM)
        assert container.process.wait(STOP_DEADLINE_S) == 0, container.text()
        assert not [each for each in inside if each.is_running()]
    except BaseException:
        print(container.text()[-6000:])
        raise
    finally:
        container.kill()


def test_a_volume_of_another_owner_is_refused_with_the_remedy(
    cpu: Image, volume: Path, tmp_path: Path
) -> None:
    shutil.chown(volume, 0, 0)
    container = Container.start(cpu, volume, tmp_path)
    assert container.process.wait(60) == 2
    assert f"/cache cannot be written by user {USER}:{USER}" in container.text()


@pytest.fixture(scope="module")
def gpu(folder: Path, python: Image, cpu_build: Build) -> Image:
    """Return the GPU image, on Python with SGLang and the CUDA compiler as its base."""
    base = cpu_build.stage("sglang-cpu")
    lock = (clean_root.ROOT / "launch" / "cpu" / "requirements.lock").read_text()
    compiler = [
        line for line in lock.splitlines() if line.startswith(("cuda-", "nvidia-cuda-nvrtc="))
    ]
    base = cpu_build.apply(base, "RUN", f"python3 -m pip install -q --no-deps {' '.join(compiler)}")
    build = clean_root.image_build(folder / "gpu", "cuda", {"python": python, "sglang": base})
    return build.stage("server")


def test_every_step_of_the_gpu_image_runs(gpu: Image) -> None:
    assert gpu.environment["DEVICE"] == "cuda"


def test_the_gpu_image_without_a_gpu_says_so(gpu: Image, volume: Path, tmp_path: Path) -> None:
    container = Container.start(gpu, volume, tmp_path, MODEL="m")
    assert container.process.wait(60) == 2
    assert "start it with --gpus all" in container.text()


COMPILE = """
import torch
from sglang_tokenweave.compiler import compile_kernel, default_cache
from sglang_tokenweave.kernels import choose_variant
expression = choose_variant(torch.bfloat16, 2, 4096).expression
compile_kernel("allreduce_rmsnorm.cu", expression, "sm_90a")
print(*sorted(f"{path} {path.stat().st_mtime_ns}" for path in default_cache().iterdir()))
"""


def test_a_second_container_finds_the_kernels_of_the_first(
    gpu: Image, volume: Path, tmp_path: Path
) -> None:
    program = replace(gpu, entrypoint=["python3", "-c", COMPILE])
    seen = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        container = Container.start(program, volume, tmp_path / name)
        assert container.process.wait(120) == 0, container.text()
        seen.append(container.text())
    assert ".kernel" in seen[0]
    assert seen[0] == seen[1]  # the same file, not compiled again
    assert seen[0].startswith("/cache/")


def wait_until_healthy(container: Container, healthcheck: list[str]) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    time.sleep(2)  # until the root is mounted there is no program to ask
    while container.health(healthcheck) != 0:
        assert time.monotonic() < deadline, "it did not become healthy"
        time.sleep(2)


def check_confinement(first: psutil.Process) -> None:
    """See that the container is as confined as docs/docker.md says, in all its processes."""
    for process in [first, *first.children(recursive=True)]:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert status["Uid"].split() == [str(USER)] * 4
        assert {status[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
