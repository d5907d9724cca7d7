"""How the doctor gathers: fake drivers, fake /proc and /dev, probes that crash or hang."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from living import is_running
from machines import FakeDriver, FakeNvml

from sglang_tokenweave import compiler, driver
from sglang_tokenweave.doctor import (
    cuda_facts,
    forms,
    machine,
    nvml_facts,
    probe,
    probes,
    software,
)
from sglang_tokenweave.doctor.facts import Failure

HOST = Path(__file__).parent / "host"
# Recorded: a proprietary and an open kernel module.
DRIVER_VERSION = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n"
)
OPEN_DRIVER_VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
)
MEMINFO = "MemTotal:       2113411372 kB\nMemFree:        10 kB\nMemAvailable:   1000000 kB\n"


def put(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def use_driver(monkeypatch, fake):
    monkeypatch.setattr(driver, "bindings", lambda: fake)
    return fake


def test_the_driver_is_asked_without_a_context_and_multicast_is_not_touched(monkeypatch):
    fake = use_driver(monkeypatch, FakeDriver())
    cuda = cuda_facts.gather()
    assert cuda.version == (13, 1)
    assert [gpu.name for gpu in cuda.gpus] == ["NVIDIA H200"] * 2
    assert cuda.gpus[1].uuid == "GPU-00000000-0000-0000-0000-000000000001"
    assert (cuda.gpus[0].num_sms, cuda.gpus[0].capability) == (132, (9, 0))
    assert cuda.gpus[0].has_multicast
    assert cuda.gpus[0].shares_memory
    assert cuda.peers == ((True, True), (True, True))
    assert {name for name in fake.calls if not name.startswith("cuDevice")} <= {
        *("cuInit", "cuDriverGetVersion")
    }
    assert not [name for name in fake.calls if "Multicast" in name or "Ctx" in name]


def test_missing_features_and_links_are_seen(monkeypatch):
    lacking = {"MULTICAST_SUPPORTED": 0, "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": 0}
    use_driver(monkeypatch, FakeDriver(reaches=False, **lacking))
    cuda = cuda_facts.gather()
    assert not cuda.gpus[0].has_multicast
    assert not cuda.gpus[0].shares_memory
    assert cuda.peers == ((True, False), (False, True))


def test_a_fabric_that_is_not_ready_is_an_error_with_its_number(monkeypatch):
    use_driver(monkeypatch, FakeDriver(init="CUDA_ERROR_SYSTEM_NOT_READY"))
    failure = probe.ask("cuda")
    assert failure.kind == "error"
    assert "CUDA_ERROR_SYSTEM_NOT_READY (802)" in failure.text


@pytest.mark.parametrize(
    ("fake", "expected"),
    [
        (FakeNvml(), {"links_up": 18, "links_down": 0, "fabric_state": "completed"}),
        (FakeNvml(links=(1, 1, 0)), {"links_up": 2, "links_down": 1}),
        (FakeNvml(links=()), {"links_up": 0, "links_down": 0}),
        (FakeNvml(state=2), {"fabric_state": "in progress", "fabric_domain": ""}),
        (FakeNvml(status=999), {"fabric_state": "completed", "fabric_status": 999}),
        (FakeNvml(state=0), {"fabric_state": ""}),
        (FakeNvml(state=None), {"fabric_state": "", "fabric_trouble": ""}),
        # Two bits a complaint, 1: yes, 2: no.
        (FakeNvml(health=0b10_10_10), {"fabric_trouble": ""}),
        (FakeNvml(health=0b01_10_10), {"fabric_trouble": "unhealthy route"}),
        (FakeNvml(health=0b01_10_01), {"fabric_trouble": "degraded bandwidth, unhealthy route"}),
        (FakeNvml(mig=1), {"is_mig": True}),
        (FakeNvml(mig=None), {"is_mig": False}),
    ],
)
def test_nvml_is_read(monkeypatch, fake, expected):
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    nvml = nvml_facts.gather()
    assert nvml.driver == "580.65.06"
    (board,) = nvml.boards
    assert {name: getattr(board, name) for name in expected} == expected
    assert fake.shut_down


def test_confidential_computing_is_seen(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(confidential=1))
    assert nvml_facts.gather().is_confidential


@pytest.mark.parametrize(
    ("files", "environment", "expected"),
    [
        ({"proc/driver/nvidia/version": DRIVER_VERSION}, {}, {"kernel_driver": "550.54.15"}),
        ({"proc/driver/nvidia/version": OPEN_DRIVER_VERSION}, {}, {"kernel_driver": "580.65.06"}),
        ({"proc/driver/nvidia/version": "gibberish"}, {}, {"kernel_driver": None}),
        ({}, {}, {"kernel_driver": None, "gpu_nodes": 0, "container": "", "seccomp": False}),
        (
            {"dev/nvidia0": "", "dev/nvidia11": "", "dev/nvidiactl": "", "dev/nvidia-uvm": ""},
            {},
            {"gpu_nodes": 2},
        ),
        ({"dev/nvidia-caps-imex-channels/channel0": ""}, {}, {"imex_channels": 1}),
        ({".dockerenv": ""}, {}, {"container": "docker"}),
        ({"run/.containerenv": ""}, {}, {"container": "podman"}),
        ({".dockerenv": ""}, {"KUBERNETES_SERVICE_HOST": "1"}, {"container": "kubernetes"}),
        ({}, {"container": "lxc"}, {"container": "container"}),
        ({"proc/self/status": "NoNewPrivs:\t0\nSeccomp:\t2\n"}, {}, {"seccomp": True}),
        ({"proc/self/status": "Seccomp:\t0\nSeccomp_filters:\t0\n"}, {}, {"seccomp": False}),
        ({"proc/meminfo": MEMINFO}, {}, {"memory_bytes": 1024000000}),
        (
            {
                "proc/meminfo": MEMINFO,
                "sys/fs/cgroup/memory.max": "600\n",
                "sys/fs/cgroup/memory.current": "500\n",
                "sys/fs/cgroup/memory.stat": "anon 400\ninactive_file 100\n",
            },
            {},
            {"memory_bytes": 200},
        ),
        (
            {"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max\n"},
            {},
            {"memory_bytes": 1024000000},
        ),
    ],
)
def test_the_system_is_read(tmp_path, files, environment, expected):
    seen = machine.gather(put(tmp_path, files), environment)
    assert {name: getattr(seen, name) for name in expected} == expected


def test_descriptors_pass_here_and_none_stays_open():
    before = len(os.listdir("/proc/self/fd"))
    assert machine.exchange_problem() is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_that_do_not_pass_are_reported(monkeypatch):
    def fail(*arguments):
        raise machine.ExchangeError("rank 0 cannot listen (Operation not permitted)")

    monkeypatch.setattr(machine, "exchange", fail)
    assert "cannot listen" in machine.exchange_problem()


@pytest.mark.parametrize(
    ("environment", "switches"),
    [
        ({}, ()),
        ({"NCCL_NVLS_ENABLE": "1", "NVSHMEM_DISABLE_NVLS": "0"}, ()),
        ({"NCCL_NVLS_ENABLE": "0", "PATH": "0"}, ("NCCL_NVLS_ENABLE=0",)),
        (
            {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "yes"},
            ("NVSHMEM_DISABLE_NVLS=yes", "TORCH_SYMM_MEM_DISABLE_MULTICAST=1"),
        ),
    ],
)
def test_switches(environment, switches):
    assert forms.multicast_switches(environment) == switches


def test_the_cache_is_looked_at_and_not_created(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = software.gather_cache(in_container=False)
    assert cache.problem is None
    assert (cache.num_kernels, cache.num_bytes) == (0, 0)
    assert not (tmp_path / "cache").exists()
    put(compiler.default_cache(), {"a.kernel": "12345", "b.partial": "1"})
    compiler.default_cache().chmod(0o770)
    cache = software.gather_cache(in_container=False)
    assert (cache.num_kernels, cache.num_bytes, cache.mode) == (1, 5, 0o770)


@pytest.mark.parametrize("is_own_layer", [True, False])
def test_a_cache_in_a_container_s_own_layer_is_volatile(tmp_path, monkeypatch, is_own_layer):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = os.stat(tmp_path).st_dev
    real = Path.stat

    def stat(path, **options):
        if path == Path("/"):
            return SimpleNamespace(st_dev=here if is_own_layer else here + 1)
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert software.gather_cache(in_container=True).is_volatile is is_own_layer
    assert not software.gather_cache(in_container=False).is_volatile


def test_a_cache_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.default_cache().mkdir(parents=True)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert f"not {other}" in software.gather_cache(in_container=False).problem


def test_without_a_home_there_is_no_cache(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiler, "default_cache", homeless)
    assert "home" in software.gather_cache(in_container=False).problem


@pytest.mark.parametrize(
    ("text", "built_for"),
    [
        ("cuda: Optional[str] = '13.0'\n", "13.0"),
        ("cuda = '12.9'\n", "12.9"),
        ("cuda: Optional[str] = None\n", None),
        ("raise SystemExit", None),
    ],
)
def test_what_torch_is_built_for_is_read_and_not_run(tmp_path, monkeypatch, text, built_for):
    put(tmp_path, {"version.py": text, "__init__.py": ""})
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: spec)
    assert software.gather_packages().torch_cuda == built_for


def use_probe(monkeypatch, tmp_path, body):
    """Let the probe `nvrtc` find a `cuda.bindings.nvrtc` with this body."""
    put(tmp_path, {"cuda/__init__.py": "", "cuda/bindings/__init__.py": ""})
    put(tmp_path, {"cuda/bindings/nvrtc.py": body})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return lambda deadline_s=20: probes.gather(["nvrtc"], deadline_s)["nvrtc"]


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "SIGSEGV"),
        ("import os; os.write(2, b'cannot map\\n'); os._exit(3)", "crashed", "3: cannot map"),
        ("raise OSError('libnvrtc.so.13: cannot open')", "error", "libnvrtc.so.13"),
        ("import nowhere", "missing", "nowhere"),
        ("raise ValueError", "error", "ValueError"),
    ],
)
def test_a_broken_library_is_an_answer(monkeypatch, tmp_path, body, kind, words):
    failure = use_probe(monkeypatch, tmp_path, body)()
    assert isinstance(failure, Failure)
    assert failure.kind == kind
    assert words in failure.text


def test_a_library_may_print(monkeypatch, tmp_path):
    body = (
        "print('hello' * 20000)\n"
        "def nvrtcVersion(): return 0, 13, 1\n"
        "def nvrtcGetSupportedArchs(): return 0, [90]\n"
    )
    assert use_probe(monkeypatch, tmp_path, body)().version == (13, 1)


def test_a_library_that_hangs_is_ended_with_what_it_started(monkeypatch, tmp_path):
    body = (
        "import subprocess, time\n"
        f"child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    start = time.monotonic()
    failure = use_probe(monkeypatch, tmp_path, body)(deadline_s=3)
    assert failure == Failure("timeout", "no answer in 3 s")
    assert time.monotonic() - start < 15
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Return a folder with stand-ins for NVIDIA's libraries, behind the real Python packages."""
    folder = tmp_path_factory.mktemp("libraries")
    for source, library in (("cuda", "libcuda.so.1"), ("nvml", "libnvidia-ml.so.1")):
        command = ["g++", "-shared", "-fPIC", "-o", folder / library, HOST / f"fake_{source}.cpp"]
        subprocess.run(command, check=True, timeout=60)
    return folder


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@needs_compiler
def test_real_packages_on_libraries_that_imitate_two_gpus(monkeypatch, libraries):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries))
    answers = probes.gather(["cuda", "nvml"], 60)
    cuda, nvml = answers["cuda"], answers["nvml"]
    assert cuda.version == (13, 1)
    assert [(gpu.name, gpu.num_sms, gpu.capability) for gpu in cuda.gpus] == [
        ("NVIDIA H200", 132, (9, 0))
    ] * 2
    assert all(gpu.shares_memory and gpu.has_multicast for gpu in cuda.gpus)
    assert not cuda.gpus[0].has_fabric_handles
    assert cuda.peers == ((True, True), (True, True))
    assert nvml.driver == "580.65.06"
    assert [board.uuid for board in nvml.boards] == [gpu.uuid for gpu in cuda.gpus]
    board = nvml.boards[1]
    assert (board.links_up, board.links_down) == (18, 0)
    assert (board.fabric_state, board.fabric_trouble) == ("in progress", "unhealthy route")
    assert board.free_bytes == 140 * 2**30


@needs_compiler
def test_a_driver_without_peers_and_one_that_is_not_ready(monkeypatch, libraries):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries))
    monkeypatch.setenv("FAKE_CUDA_PEERS", "0")
    assert probes.gather(["cuda"], 60)["cuda"].peers == ((True, False), (False, True))
    monkeypatch.setenv("FAKE_CUDA_INIT", "802")
    assert "CUDA_ERROR_SYSTEM_NOT_READY (802)" in probes.gather(["cuda"], 60)["cuda"].text
