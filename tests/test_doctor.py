"""The doctor's judgement: each finding of its catalogue, the verdict, the fifteen pains."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from machines import (
    GIB,
    MACHINE,
    board,
    cuda_of,
    facts,
    gpu,
    nvml_of,
    with_cache,
    with_machine,
    with_packages,
    with_version,
)

from sglang_tokenweave import kernels
from sglang_tokenweave.doctor import checkup, hardware, logs, versions
from sglang_tokenweave.doctor.facts import Cuda, Failure, Nvml, Nvrtc, Sglang
from sglang_tokenweave.doctor.findings import CATALOGUE, Level
from sglang_tokenweave.doctor.pains import PAINS
from sglang_tokenweave.doctor.verdict import decide

NO_LIBRARY = Failure("error", "Failed to dlopen libcuda.so.1")
CPU = facts(
    machine=replace(MACHINE, kernel_driver=None, gpu_nodes=0),
    cuda=NO_LIBRARY,
    nvml=Failure("error", "NVML Shared Library Not Found"),
    packages=with_packages(torch_cuda=None).packages,
)
NOBODY = ((True, False), (False, True))

# A finding's id, a machine that shows it, and words of its text.
SICK = [
    ("no-gpu", CPU, "libcuda"),
    ("gpus-not-visible", facts(cuda=NO_LIBRARY), "580.65.06"),
    ("gpus-not-visible", facts(cuda=Cuda((13, 0), (), ()), visible=""), "CUDA_VISIBLE_DEVICES=''"),
    ("one-gpu", facts(cuda=cuda_of(1), nvml=nvml_of(1)), "nothing|no communication"),
    ("gpu-count", facts(cuda=cuda_of(3), nvml=nvml_of(3)), "3 GPUs"),
    (
        "gpus-differ",
        facts(cuda=Cuda((13, 0), (gpu(0), gpu(1, name="NVIDIA H100")), cuda_of().peers)),
        "NVIDIA H200, NVIDIA H100",
    ),
    ("gpu-unsupported", facts(cuda=cuda_of(capability=(8, 0))), "8.0"),
    ("gpu-cannot-share", facts(cuda=cuda_of(shares_memory=False)), "descriptor"),
    ("mig", facts(nvml=nvml_of(is_mig=True)), "MIG"),
    (
        "driver-not-ready",
        facts(cuda=Failure("error", "cuInit: CUDA_ERROR_SYSTEM_NOT_READY (802)")),
        "NVSwitch .*802",
    ),
    ("driver-failed", facts(cuda=Failure("error", "cuInit: CUDA_ERROR_UNKNOWN (999)")), "999"),
    ("driver-failed", facts(cuda=Failure("timeout", "no answer in 120 s")), "120 s"),
    ("driver-failed", facts(cuda=Failure("crashed", "ended by SIGSEGV")), "SIGSEGV"),
    ("driver-too-old", facts(cuda=cuda_of(version=(12, 8))), "NVRTC 13.0 and torch's CUDA 13.0"),
    (
        "cuda-python-missing",
        facts(cuda=Failure("error", "cuda-python is missing: pip install")),
        "cuda-python is missing",
    ),
    ("nvrtc-unusable", facts(nvrtc=Failure("error", "no libnvrtc.so.13")), "libnvrtc"),
    ("nvrtc-unusable", facts(nvrtc=Nvrtc((13, 0), (80,))), "does not know 9.0"),
    ("nvml-missing", facts(nvml=Failure("missing", "No module named 'pynvml'")), "pynvml"),
    ("no-peer-access", facts(cuda=replace(cuda_of(), peers=NOBODY)), "GPUs 1-0"),
    ("no-nvlink", facts(nvml=nvml_of(links_up=0)), "PCIe"),
    ("nvlink-down", facts(nvml=nvml_of(links_up=16, links_down=2)), "4 NVLink"),
    (
        "fabric-differs",
        facts(nvml=Nvml("580", False, (board(0), board(1, fabric_domain="0/1")))),
        "more than one",
    ),
    ("multicast-switched-off", facts(switches=("NCCL_NVLS_ENABLE=0",)), "NCCL_NVLS_ENABLE=0"),
    ("multicast-unsupported", facts(cuda=cuda_of(has_multicast=False)), "no NVSwitch"),
    ("multicast-unproven", facts(), "only a bind"),
    ("fabric-not-ready", facts(nvml=nvml_of(fabric_state="in progress")), "401, 1 or 802"),
    ("fabric-not-ready", facts(nvml=nvml_of(fabric_status=999)), "completed .status 999"),
    ("fabric-unhealthy", facts(nvml=nvml_of(fabric_trouble="unhealthy route")), "unhealthy route"),
    ("no-imex-channel", with_machine(imex_channels=0), "IMEX"),
    ("seccomp", with_machine(seccomp=True), "pidfd_getfd"),
    ("exchange-failed", with_machine(exchange_problem="rank 0 cannot listen"), "cannot listen"),
    ("shared-memory-small", with_machine(shm_bytes=64 * 2**20), "64 MiB"),
    ("open-files-few", with_machine(open_files=1024), "1024"),
    ("host-memory-low", with_machine(memory_bytes=6 * GIB), "6.0 GiB .* 8"),
    ("gpu-memory-low", facts(nvml=nvml_of(free_bytes=40 * GIB)), "101.0 GiB of GPU 0"),
    ("cache-unusable", with_cache(problem="it belongs to uid 0, not 1000"), "uid 0"),
    ("cache-open", with_cache(mode=0o777), "777"),
    ("cache-full", with_cache(free_bytes=2**20), "1 MiB"),
    ("cache-volatile", with_cache(is_volatile=True), "own layer"),
    ("python-untested", with_packages(python=(3, 13)), "3.13"),
    ("sglang-missing", with_version("sglang", None), "not installed"),
    ("sglang-untested", with_version("sglang", "0.5.24"), "0.5.24"),
    ("sglang-untested", with_version("sglang", "0.5.16.post2"), "0.5.16"),
    ("sglang-broken", facts(sglang=Failure("error", "No module named 'sgl_kernel'")), "sgl_kernel"),
    ("torch-missing", with_version("torch", None), "torch"),
    ("torch-without-cuda", with_packages(torch_cuda=None), "without CUDA"),
    ("cuda-python-untested", with_version("cuda-bindings", "12.9.4"), "12.9.4"),
    ("plugin-not-loaded", with_packages(plugin_problem="SGLANG_PLUGINS='x'"), "SGLANG_PLUGINS"),
    ("options-invalid", with_packages(config_problem="unknown option 'y'"), "'y'"),
    ("seams-missing", facts(sglang=Sglang(8, ("SGLang has no x",), ())), "SGLang has no x"),
    ("seams-partial", facts(sglang=Sglang(8, (), ("no run_batch",))), "no run_batch"),
]


def found(machine):
    return {each.id: each for each in checkup.judge(machine)}


@pytest.mark.parametrize(("name", "machine", "words"), SICK, ids=lambda value: str(value)[:24])
def test_each_finding_is_made_from_its_facts(name, machine, words):
    shown = found(machine)
    assert name in shown, shown
    assert re.search(words, shown[name].text), shown[name].text
    level, remedy = CATALOGUE[name]
    assert shown[name].level is level
    assert remedy


def test_a_healthy_machine_shows_ten_lines_and_nothing_to_worry_about():
    shown = found(facts())
    assert {each.level for each in shown.values()} == {Level.OK, Level.NOTE}
    assert list(shown) == [
        *("gpus", "driver", "links", "multicast-unproven"),
        *("container", "memory", "cache", "versions", "seams"),
    ]
    assert "2 x NVIDIA H200 (132 SMs, compute capability 9.0, kernels for sm_90a)" in (
        shown["gpus"].text
    )
    assert "18 NVLinks up on each" in shown["links"].text


def test_every_finding_of_the_catalogue_is_tested():
    of_selftest = {name for name in CATALOGUE if name.startswith("selftest-")}  # test_doctor_op.py
    assert {name for name, _, _ in SICK} | set(found(facts())) | of_selftest == set(CATALOGUE)


@pytest.mark.parametrize(
    ("machine", "can_weave", "transport", "words"),
    [
        (facts(), True, "peer", "can weave with --tokenweave-transport peer"),
        (facts(cuda=cuda_of(8), nvml=nvml_of(8)), True, "multicast", "multicast"),
        (
            facts(cuda=cuda_of(8), nvml=nvml_of(8), switches=("NVSHMEM_DISABLE_NVLS=1",)),
            True,
            "peer",
            "peer",
        ),
        (
            facts(cuda=cuda_of(8), nvml=nvml_of(8, fabric_state="in progress")),
            True,
            "peer",
            "peer",
        ),
        (facts(cuda=cuda_of(has_multicast=False)), True, "peer", "peer"),  # pain 7: it stays on
        (facts(cuda=replace(cuda_of(), peers=NOBODY)), False, None, "runs stock because no peer"),
        (CPU, False, "reference", "CPU only: for tests"),
        (replace(CPU, sglang=Failure("error", "broken")), False, None, "not even for tests"),
    ],
)
def test_verdict(machine, can_weave, transport, words):
    verdict = decide(machine, checkup.judge(machine))
    assert (verdict.can_weave, verdict.transport) == (can_weave, transport)
    assert re.search(words, verdict.text), verdict.text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"nvml": nvml_of(is_mig=True)}, "MIG"),
        ({"nvml": nvml_of(is_vgpu=True)}, "vGPU"),
        ({"nvml": replace(nvml_of(), is_confidential=True)}, "confidential"),
        ({"nvml": Failure("missing", "")}, "no NVSwitch"),
    ],
)
def test_why_multicast_is_off_is_said_plainly(changes, why):
    text = found(facts(cuda=cuda_of(has_multicast=False), **changes))["multicast-unsupported"].text
    assert text.startswith("multicast is off here because GPU 0, 1")
    assert why in text


def test_all_switches_are_named():
    switches = ("NCCL_NVLS_ENABLE=0", "TORCH_SYMM_MEM_DISABLE_MULTICAST=1")
    text = found(facts(switches=switches))["multicast-switched-off"].text
    assert all(switch in text for switch in switches)
    assert "the GPUs would have it" in text


def test_pains_point_to_findings_that_exist():
    assert list(PAINS) == list(range(1, 16))
    for pain in PAINS.values():
        assert pain.findings
        assert set(pain.findings) <= CATALOGUE.keys() | logs.CATALOGUE.keys()


def test_numbers_agree_with_the_rest_of_the_project():
    assert hardware.NUM_RANKS == kernels.RANKS
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    extra = project["project"]["optional-dependencies"]["gpu"]
    oldest, newest = (".".join(map(str, version)) for version in versions.SGLANG)
    beyond = f"{newest.rpartition('.')[0]}.{versions.SGLANG[1][2] + 1}"
    assert f"sglang>={oldest},<{beyond}" in extra
    assert project["project"]["requires-python"] == ">=3.11,<3.13"
    assert versions.PYTHON == ((3, 11), (3, 12))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0.5.23", (0, 5, 23)), ("2.13.0+cpu", (2, 13, 0)), ("0.5.17rc1", (0, 5, 17)), ("main", (0,))],
)
def test_versions_are_read(text, numbers):
    assert versions.parse(text) == numbers
