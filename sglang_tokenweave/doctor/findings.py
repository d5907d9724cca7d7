"""Every finding of the machine by its id: how bad it is and what to do. `docs/doctor.md` has more.

The sentence of a finding names what was seen, so it is made where the facts are judged.
"""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much a finding matters, least first."""

    OK = "ok"
    NOTE = "note"  # worth to know; nothing has to be done
    WARNING = "warning"  # it works, but slower or less safely than it could
    PROBLEM = "problem"  # it keeps this machine from weaving, or a server from running


@dataclass(frozen=True)
class Finding:
    """What was seen, how much it matters, and what to do about it."""

    id: str
    level: Level
    text: str
    remedy: str


_GPUS_INTO_CONTAINER = (
    "start the container with its GPUs: docker run --gpus all, or in Kubernetes "
    "resources.limits: nvidia.com/gpu, with the NVIDIA container toolkit on the host"
)
_FABRIC_MANAGER = (
    "on the host: systemctl status nvidia-fabricmanager; its version must be the driver's; after "
    "a restart of it the GPUs must be reset (nvidia-smi --gpu-reset) or the machine rebooted"
)

CATALOGUE: dict[str, tuple[Level, str]] = {
    # GPUs
    "gpus": (Level.OK, ""),
    "no-gpu": (Level.NOTE, "nothing to do on a machine for tests; weaving pays on GPUs only"),
    "gpus-not-visible": (Level.PROBLEM, _GPUS_INTO_CONTAINER),
    "one-gpu": (Level.PROBLEM, "weaving needs a tensor parallel size of 2 or more"),
    "gpus-differ": (Level.WARNING, "choose equal GPUs with CUDA_VISIBLE_DEVICES"),
    "gpu-unsupported": (Level.PROBLEM, "serve with stock SGLang, or on GPUs of a listed kind"),
    "gpu-cannot-share": (Level.PROBLEM, "update the driver; under WSL or vGPU there is no remedy"),
    "gpu-count": (Level.NOTE, "choose --tp 2, 4, 6 or 8"),
    "mig": (Level.PROBLEM, "switch MIG off (nvidia-smi -mig 0): its slices reach no other GPU"),
    # driver and compiler
    "driver": (Level.OK, ""),
    "driver-not-ready": (Level.PROBLEM, _FABRIC_MANAGER),
    "driver-failed": (Level.PROBLEM, "check nvidia-smi on the host and in the container"),
    "driver-too-old": (Level.PROBLEM, "update the driver to one that serves this CUDA"),
    "cuda-python-missing": (Level.PROBLEM, "pip install 'cuda-python>=13,<14'"),
    "nvrtc-unusable": (
        Level.PROBLEM,
        "pip install 'nvidia-cuda-nvrtc>=13,<14' in the version of cuda-bindings",
    ),
    "nvml-missing": (Level.NOTE, "pip install nvidia-ml-py; links and memory stay unknown without"),
    # links
    "links": (Level.OK, ""),
    "no-peer-access": (
        Level.PROBLEM,
        "choose GPUs that reach each other (nvidia-smi topo -p2p r, CUDA_VISIBLE_DEVICES); in a "
        "virtual machine, or with IOMMU or ACS on, peer access over PCIe is often off",
    ),
    "no-nvlink": (Level.WARNING, "expect no gain over PCIe: measure before you keep it on"),
    "nvlink-down": (Level.WARNING, "check nvidia-smi nvlink --status; reset the GPU or report it"),
    "fabric-differs": (Level.WARNING, "choose GPUs of one NVLink domain with CUDA_VISIBLE_DEVICES"),
    # multicast
    "multicast-switched-off": (
        Level.NOTE,
        "unset the variable to allow multicast; `peer` needs none and runs as it is",
    ),
    "multicast-unsupported": (Level.NOTE, "nothing to do: `peer` needs no multicast"),
    "multicast-unproven": (
        Level.NOTE,
        "python -m sglang_tokenweave.doctor --selftest-multicast binds memory and proves it",
    ),
    "fabric-not-ready": (Level.WARNING, _FABRIC_MANAGER),
    "fabric-unhealthy": (
        Level.WARNING,
        "check nvidia-smi -q (Fabric), reset the GPUs or report it",
    ),
    "no-imex-channel": (
        Level.OK,
        "nothing to do on one machine: file descriptors carry the memory; FABRIC handles would "
        "need /dev/nvidia-caps-imex-channels/channel0 in the container",
    ),
    # operating system
    "container": (Level.OK, ""),
    "seccomp": (
        Level.OK,
        "nothing to do: no capability and no ptrace is needed, descriptors travel over a socket",
    ),
    "exchange-failed": (
        Level.PROBLEM,
        "run all ranks on one host, in one container, as one user; raise ulimit -n",
    ),
    "shared-memory-small": (
        Level.WARNING,
        "docker run --shm-size 16g (or --ipc host); in Kubernetes mount an emptyDir with medium: "
        "Memory on /dev/shm",
    ),
    "open-files-few": (Level.WARNING, "raise the hard limit: docker run --ulimit nofile=65536"),
    "memory": (Level.OK, ""),
    "host-memory-low": (Level.WARNING, "stop other programs or raise the container's limit"),
    "gpu-memory-low": (Level.WARNING, "stop the processes that nvidia-smi lists on this GPU"),
    # kernels' cache
    "cache": (Level.OK, ""),
    "cache-unusable": (
        Level.WARNING,
        "let XDG_CACHE_HOME name a folder of this user, or kernels compile at every start",
    ),
    "cache-open": (Level.WARNING, "chmod 700 the folder, or kernels compile at every start"),
    "cache-full": (Level.WARNING, "make room: kernels compile at every start otherwise"),
    "cache-volatile": (
        Level.NOTE,
        "mount a volume there, or a new container compiles its kernels again",
    ),
    # software
    "versions": (Level.OK, ""),
    "python-untested": (Level.WARNING, "use Python 3.11 or 3.12"),
    "sglang-missing": (Level.PROBLEM, "pip install 'sglang>=0.5.17,<0.5.24'"),
    "sglang-untested": (Level.WARNING, "use SGLang 0.5.17 to 0.5.23"),
    "sglang-broken": (Level.PROBLEM, "install SGLang again: python -c 'import sglang.srt'"),
    "torch-missing": (Level.PROBLEM, "install SGLang with its requirements"),
    "torch-without-cuda": (Level.PROBLEM, "install the CUDA build of torch, as SGLang requires it"),
    "cuda-python-untested": (Level.WARNING, "pip install 'cuda-python>=13,<14'"),
    "plugin-not-loaded": (Level.PROBLEM, "as it says; then start the server again"),
    "options-invalid": (Level.PROBLEM, "correct or unset the variable"),
    "seams": (Level.OK, ""),
    "seams-missing": (Level.PROBLEM, "use SGLang 0.5.17 to 0.5.23, and no other patches of it"),
    "seams-partial": (Level.WARNING, "use SGLang 0.5.17 to 0.5.23, and no other patches of it"),
    # self-test
    "selftest-passed": (Level.OK, ""),
    "selftest-one-gpu": (Level.NOTE, "run it where two GPUs are, to measure their link"),
    "selftest-slow": (
        Level.WARNING,
        "weaving may not pay here: compare with stock before using it",
    ),
    "selftest-wrong": (Level.PROBLEM, "do not serve with it, and report this machine's --json"),
    "selftest-failed": (
        Level.PROBLEM,
        "the message says what to do; above it are the ranks' words",
    ),
    "selftest-not-run": (
        Level.NOTE,
        "run it on a machine with GPUs and without the problems above",
    ),
    "selftest-refused": (Level.PROBLEM, "unset the variable if multicast may be used here"),
}


def finding(name: str, text: str) -> Finding:
    """Return the finding with this id, saying what was seen."""
    level, remedy = CATALOGUE[name]
    return Finding(name, level, text, remedy)
