"""Judge the GPUs, their driver, links and multicast."""

from collections.abc import Iterable, Iterator

from sglang_tokenweave.compiler import ARCHITECTURES
from sglang_tokenweave.doctor.facts import Cuda, Facts, Failure, Nvml, Nvrtc, Version
from sglang_tokenweave.doctor.findings import Finding, finding

NUM_RANKS = (2, 4, 6, 8)  # as sglang_tokenweave.kernels has them, without importing torch


def judge(facts: Facts) -> Iterator[Finding]:
    """Yield the findings on everything between the GPUs and the CUDA driver."""
    if not facts.has_nvidia:
        yield finding("no-gpu", f"no NVIDIA GPU and no driver here ({_why_no_cuda(facts)})")
    elif isinstance(facts.cuda, Failure):
        yield _driver_trouble(facts, facts.cuda)
    elif not facts.gpus:
        seen = "" if facts.visible is None else f"; CUDA_VISIBLE_DEVICES={facts.visible!r}"
        yield finding("gpus-not-visible", f"the CUDA driver shows no GPU to this process{seen}")
    else:
        yield from _gpus(facts)
        yield from _driver(facts, facts.cuda)
        yield from _links(facts, facts.cuda)
        yield from _multicast(facts)


def _why_no_cuda(facts: Facts) -> str:
    return facts.cuda.text if isinstance(facts.cuda, Failure) else "CUDA shows none"


def _driver_trouble(facts: Facts, failure: Failure) -> Finding:
    if failure.kind == "missing":
        return finding("cuda-python-missing", failure.text)
    if "cuda-python is missing" in failure.text:
        return finding("cuda-python-missing", failure.text)
    if "libcuda" in failure.text or not facts.machine.gpu_nodes:
        return finding(
            "gpus-not-visible",
            f"the kernel has NVIDIA's driver {facts.machine.kernel_driver or ''} but this process "
            f"sees {facts.machine.gpu_nodes} GPU device(s): {failure.text}",
        )
    if "SYSTEM_NOT_READY" in failure.text:
        return finding("driver-not-ready", f"NVSwitch is not set up: {failure.text}")
    return finding("driver-failed", f"the CUDA driver does not answer: {failure.text}")


def _gpus(facts: Facts) -> Iterator[Finding]:
    gpus = facts.gpus
    kinds = {gpu.name: gpu for gpu in gpus}
    shown = ", ".join(
        f"{sum(gpu.name == name for gpu in gpus)} x {name} ({gpu.num_sms} SMs, compute capability "
        f"{_dotted(gpu.capability)}, kernels for {ARCHITECTURES.get(gpu.capability, 'none')})"
        for name, gpu in kinds.items()
    )
    yield finding("gpus", shown)
    if len(gpus) == 1:
        yield finding("one-gpu", "one GPU is visible: there is no communication to hide")
    elif len(gpus) not in NUM_RANKS:
        yield finding("gpu-count", f"{len(gpus)} GPUs: the kernel is built for 2, 4, 6 or 8 ranks")
    if len(kinds) > 1:
        yield finding("gpus-differ", f"the GPUs differ ({', '.join(kinds)}): the slowest decides")
    unsupported = sorted({gpu.capability for gpu in gpus} - ARCHITECTURES.keys())
    if unsupported:
        have, known = _listed(unsupported), _listed(ARCHITECTURES)
        yield finding("gpu-unsupported", f"no kernel for compute capability {have}, only {known}")
    if not all(gpu.shares_memory for gpu in gpus):
        yield finding("gpu-cannot-share", "a GPU cannot export its memory as a file descriptor")
    if any(board.is_mig for board in facts.boards):
        yield finding("mig", "MIG is on: a slice of a GPU has no peer access and no multicast")


def _driver(facts: Facts, cuda: Cuda) -> Iterator[Finding]:
    kernel = facts.nvml.driver if isinstance(facts.nvml, Nvml) else facts.machine.kernel_driver
    nvrtc = facts.nvrtc
    compiler = f"NVRTC {_dotted(nvrtc.version)}" if isinstance(nvrtc, Nvrtc) else "no NVRTC"
    yield finding(
        "driver", f"driver {kernel or 'unknown'}, CUDA {_dotted(cuda.version)}, {compiler}"
    )
    if isinstance(facts.nvml, Failure):
        yield finding("nvml-missing", f"NVML does not answer: {facts.nvml.text}")
    if isinstance(nvrtc, Failure):
        yield finding("nvrtc-unusable", f"the compiler library does not answer: {nvrtc.text}")
        return
    unknown = {gpu.capability for gpu in cuda.gpus if gpu.capability in ARCHITECTURES} - {
        divmod(capability, 10) for capability in nvrtc.capabilities
    }
    if unknown:
        yield finding("nvrtc-unusable", f"{compiler} does not know {_listed(sorted(unknown))}")
    torch_cuda = facts.packages.torch_cuda
    needed = {compiler: nvrtc.version[0]}
    if torch_cuda:
        needed[f"torch's CUDA {torch_cuda}"] = int(torch_cuda.split(".")[0])
    newer = [name for name, major in needed.items() if major > cuda.version[0]]
    if newer:
        text = f"the driver serves CUDA {_dotted(cuda.version)}, but there is {' and '.join(newer)}"
        yield finding("driver-too-old", text)


def _links(facts: Facts, cuda: Cuda) -> Iterator[Finding]:
    num = len(cuda.gpus)
    if num < 2:
        return
    strangers = [
        f"{i}-{j}" for i in range(num) for j in range(i) if not cuda.peers[i][j] & cuda.peers[j][i]
    ]
    if strangers:
        pairs = ", ".join(strangers)
        yield finding("no-peer-access", f"no peer access between GPUs {pairs}: stock SGLang only")
        return
    boards = facts.boards
    ups = sorted({board.links_up for board in boards})
    links = f"{'/'.join(map(str, ups))} NVLinks up on each" if ups else "NVLinks unknown"
    yield finding("links", f"peer access between all {num} GPUs; {links}")
    if ups and ups[0] == 0:
        yield finding("no-nvlink", "a GPU has no NVLink: its peers are reached over PCIe")
    elif any(board.links_down for board in boards):
        down = sum(board.links_down for board in boards)
        yield finding("nvlink-down", f"{down} NVLink(s) are down: bandwidth is lost")
    if len({board.fabric_domain for board in boards if board.fabric_domain}) > 1:
        yield finding("fabric-differs", "the GPUs are in more than one NVLink domain")


def _multicast(facts: Facts) -> Iterator[Finding]:
    without = [str(i) for i, gpu in enumerate(facts.gpus) if not gpu.has_multicast]
    if facts.switches:
        yield finding(
            "multicast-switched-off",
            f"multicast is off here because the environment says {' and '.join(facts.switches)}"
            + ("" if without else " (the GPUs would have it)"),
        )
    if without:
        text = f"multicast is off here because GPU {', '.join(without)} {_why_no_multicast(facts)}"
        yield finding("multicast-unsupported", text)
    elif not facts.switches and len(facts.gpus) > 1:
        yield finding("multicast-unproven", "the GPUs have multicast, but only a bind can prove it")
    unready = [
        board for board in facts.boards if not _is_ready(board.fabric_state, board.fabric_status)
    ]
    if unready:
        state, status = unready[0].fabric_state, unready[0].fabric_status
        yield finding(
            "fabric-not-ready",
            f"the NVLink fabric of {len(unready)} GPU(s) is {state} (status {status}): binding "
            "multicast memory would fail with CUDA 401, 1 or 802",
        )
    troubles = sorted({board.fabric_trouble for board in facts.boards} - {""})
    if troubles:
        yield finding("fabric-unhealthy", f"the NVLink fabric reports {'; '.join(troubles)}")
    if any(gpu.has_fabric_handles for gpu in facts.gpus) and not facts.machine.imex_channels:
        yield finding(
            "no-imex-channel", "no IMEX channel for FABRIC handles; one machine needs none"
        )


def _is_ready(state: str, status: int) -> bool:
    return state == "" or (state == "completed" and status == 0)


def _why_no_multicast(facts: Facts) -> str:
    if any(board.is_mig for board in facts.boards):
        return "is cut in MIG slices"
    if any(board.is_vgpu for board in facts.boards):
        return "is a vGPU"
    if isinstance(facts.nvml, Nvml) and facts.nvml.is_confidential:
        return "lacks it under confidential computing"
    return "lacks it (no NVSwitch, or a virtual machine without the whole fabric)"


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _listed(versions: Iterable[Version]) -> str:
    return ", ".join(map(_dotted, versions))
