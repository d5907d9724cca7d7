"""What is known of a machine: plain values, so that every judgement of it is a pure function."""

from collections.abc import Mapping
from dataclasses import dataclass

Version = tuple[int, int]


@dataclass(frozen=True)
class Failure:
    """A probe without an answer."""

    kind: str  # missing: a package; error: it raised; crashed: by a signal; timeout
    text: str  # one line


@dataclass(frozen=True)
class Gpu:
    """A GPU as the CUDA driver shows it to this process."""

    name: str
    uuid: str  # as NVML writes it
    num_sms: int
    capability: Version
    shares_memory: bool  # virtual memory management and export as a file descriptor
    has_fabric_handles: bool
    has_multicast: bool  # the attribute; it does not prove that a multicast object can be bound


@dataclass(frozen=True)
class Cuda:
    """The CUDA driver."""

    version: Version  # the newest CUDA that it serves
    gpus: tuple[Gpu, ...]
    peers: tuple[tuple[bool, ...], ...]  # [i][j]: GPU i reaches GPU j's memory


@dataclass(frozen=True)
class Board:
    """A GPU as the management library (NVML) shows it; it may see more of them than CUDA does."""

    uuid: str
    free_bytes: int
    total_bytes: int
    links_up: int
    links_down: int
    fabric_state: str  # "": it has none; not started, in progress, completed
    fabric_status: int  # 0: success; only where the state is completed
    fabric_domain: str  # cluster and clique: equal for GPUs that one NVLink fabric joins
    fabric_trouble: str  # what its health mask complains of
    is_mig: bool
    is_vgpu: bool


@dataclass(frozen=True)
class Nvml:
    """The kernel driver and the boards."""

    driver: str
    is_confidential: bool
    boards: tuple[Board, ...]


@dataclass(frozen=True)
class Nvrtc:
    """The compiler library."""

    version: Version
    capabilities: tuple[int, ...]  # 90: 9.0


@dataclass(frozen=True)
class Sglang:
    """What our hooks and seams found when SGLang was imported."""

    num_hooks: int
    missing: tuple[str, ...]  # without these nothing is woven
    partial: tuple[str, ...]  # without these metrics, logs or options are lost


@dataclass(frozen=True)
class Packages:
    """Versions as installed; None: not there."""

    python: Version
    versions: Mapping[str, str | None]
    torch_cuda: str | None  # the CUDA that torch was built for
    plugin_problem: str | None  # why SGLang's workers would not load us
    config_problem: str | None  # what is wrong with our environment variable


@dataclass(frozen=True)
class Machine:
    """What the operating system says."""

    kernel_driver: str | None  # NVIDIA's, loaded in the kernel
    gpu_nodes: int  # /dev/nvidia0 ...
    imex_channels: int  # that this user may open
    container: str  # "", docker, podman, kubernetes or container
    seccomp: bool
    exchange_problem: str | None  # of a descriptor passed over a socket, tried
    open_files: int  # hard limit
    shm_bytes: int  # free in /dev/shm
    memory_bytes: int  # available, within the container's limit


@dataclass(frozen=True)
class Cache:
    """The folder of compiled kernels."""

    folder: str
    problem: str | None  # why it cannot be used
    mode: int = 0o700
    num_kernels: int = 0
    num_bytes: int = 0
    free_bytes: int = 0
    is_volatile: bool = False  # in a container's own layer: gone with the container


@dataclass(frozen=True)
class Facts:
    """Everything; a probe that failed stands in the place of its answer."""

    version: str  # ours
    switches: tuple[str, ...]  # NAME=value of the operator's switches against multicast
    visible: str | None  # CUDA_VISIBLE_DEVICES
    machine: Machine
    packages: Packages
    cache: Cache
    cuda: Cuda | Failure
    nvml: Nvml | Failure
    nvrtc: Nvrtc | Failure
    sglang: Sglang | Failure

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that CUDA shows; empty without a driver."""
        return self.cuda.gpus if isinstance(self.cuda, Cuda) else ()

    @property
    def boards(self) -> tuple[Board, ...]:
        """The boards of these GPUs, as far as NVML knows them."""
        known = self.nvml.boards if isinstance(self.nvml, Nvml) else ()
        visible = {gpu.uuid for gpu in self.gpus}
        return tuple(board for board in known if board.uuid in visible)

    @property
    def has_nvidia(self) -> bool:
        """Whether anything tells of an NVIDIA GPU in this machine."""
        return bool(self.gpus or self.machine.gpu_nodes or self.machine.kernel_driver)
