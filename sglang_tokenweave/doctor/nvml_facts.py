"""Ask NVIDIA's management library, through the package nvidia-ml-py: links, fabric, free memory."""

import ctypes
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from sglang_tokenweave.doctor.facts import Board, Nvml

T = TypeVar("T")
_STATES = {1: "not started", 2: "in progress", 3: "completed"}
_COMPLAINTS = {"DEGRADED_BW": "degraded bandwidth", "ROUTE_UNHEALTHY": "unhealthy route"}


def gather() -> Nvml:
    """Return what NVML says.

    Raises:
        ImportError: nvidia-ml-py is not installed.
        NVMLError: the library or the driver is not here.
    """
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return Nvml(
            driver=nvml.nvmlSystemGetDriverVersion(),
            is_confidential=_or(nvml, False, lambda: _is_confidential(nvml)),
            boards=tuple(_board(nvml, handle) for handle in handles),
        )
    finally:
        nvml.nvmlShutdown()


def _or(nvml: Any, default: T, ask: Callable[[], T]) -> T:
    """Ask; a GPU or driver that does not know the question gives the default."""
    try:
        return ask()
    except nvml.NVMLError:
        return default


def _is_confidential(nvml: Any) -> bool:
    return bool(nvml.nvmlSystemGetConfComputeState().ccFeature)


def _board(nvml: Any, handle: Any) -> Board:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    links = _links(nvml, handle)
    state, status, domain, trouble = _or(nvml, ("", 0, "", ""), lambda: _fabric(nvml, handle))
    vgpu = nvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU
    return Board(
        uuid=nvml.nvmlDeviceGetUUID(handle),
        free_bytes=memory.free,
        total_bytes=memory.total,
        links_up=sum(links),
        links_down=len(links) - sum(links),
        fabric_state=state,
        fabric_status=status,
        fabric_domain=domain,
        fabric_trouble=trouble,
        is_mig=_or(nvml, False, lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0])),
        is_vgpu=_or(nvml, False, lambda: nvml.nvmlDeviceGetVirtualizationMode(handle) == vgpu),
    )


def _links(nvml: Any, handle: Any) -> list[bool]:
    """Return for each NVLink that the GPU has whether it is up."""
    states = [
        _or(nvml, None, lambda link=link: nvml.nvmlDeviceGetNvLinkState(handle, link))  # type: ignore[misc] # mypy cannot infer a lambda's default
        for link in range(nvml.NVML_NVLINK_MAX_LINKS)
    ]
    return [bool(state) for state in states if state is not None]


def _fabric(nvml: Any, handle: Any) -> tuple[str, int, str, str]:
    info = nvml.c_nvmlGpuFabricInfo_v2_t()
    nvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info))
    complaints = [text for name, text in _COMPLAINTS.items() if _complains(nvml, info, name)]
    state = _STATES.get(info.state, "")
    domain = f"{bytes(info.clusterUuid).hex()}/{info.cliqueId}" if state == "completed" else ""
    return state, info.status, domain, ", ".join(complaints)


def _complains(nvml: Any, info: Any, name: str) -> bool:
    prefix = "NVML_GPU_FABRIC_HEALTH_MASK_"
    shift = getattr(nvml, f"{prefix}SHIFT_{name}")
    width = getattr(nvml, f"{prefix}WIDTH_{name}")
    return bool(info.healthMask >> shift & width == getattr(nvml, f"{prefix}{name}_TRUE"))
