"""Machines to diagnose: two H200 with everything right, and changes of it; fake libraries."""

from dataclasses import replace
from types import SimpleNamespace

import pynvml
from cuda.bindings import driver as cuda

from sglang_tokenweave.doctor.facts import (
    Board,
    Cache,
    Cuda,
    Facts,
    Gpu,
    Machine,
    Nvml,
    Nvrtc,
    Packages,
    Sglang,
)

GIB = 2**30


def gpu(index, **changes):
    h200 = Gpu(
        name="NVIDIA H200",
        uuid=f"GPU-{index:08x}-0000-0000-0000-000000000000",
        num_sms=132,
        capability=(9, 0),
        shares_memory=True,
        has_fabric_handles=True,
        has_multicast=True,
    )
    return replace(h200, **changes)


def board(index, **changes):
    h200 = Board(
        uuid=gpu(index).uuid,
        free_bytes=140 * GIB,
        total_bytes=141 * GIB,
        links_up=18,
        links_down=0,
        fabric_state="completed",
        fabric_status=0,
        fabric_domain="0/0",
        fabric_trouble="",
        is_mig=False,
        is_vgpu=False,
    )
    return replace(h200, **changes)


def cuda_of(num=2, version=(13, 0), **changes):
    everybody = tuple((True,) * num for _ in range(num))
    return Cuda(version, tuple(gpu(i, **changes) for i in range(num)), everybody)


def nvml_of(num=2, **changes):
    return Nvml("580.65.06", False, tuple(board(i, **changes) for i in range(num)))


MACHINE = Machine(
    kernel_driver="580.65.06",
    gpu_nodes=2,
    imex_channels=1,
    container="",
    seccomp=False,
    exchange_problem=None,
    open_files=65536,
    shm_bytes=64 * GIB,
    memory_bytes=512 * GIB,
)
PACKAGES = Packages(
    python=(3, 12),
    versions={
        "sglang": "0.5.23",
        "torch": "2.13.0",
        "flashinfer-python": "0.7.2",
        "cuda-bindings": "13.0.3",
        "nvidia-cuda-nvrtc": "13.0.88",
        "nvidia-ml-py": "13.580.65",
    },
    torch_cuda="13.0",
    plugin_problem=None,
    config_problem=None,
)
CACHE = Cache("/home/you/.cache/sglang_tokenweave/kernels", None, 0o700, 3, 600_000, 100 * GIB)


def facts(**changes):
    """Return two H200 on which everything is right and a server can select `peer`."""
    good = {
        "version": "0.1.0",
        "switches": (),
        "visible": None,
        "machine": MACHINE,
        "packages": PACKAGES,
        "cache": CACHE,
        "cuda": cuda_of(),
        "nvml": nvml_of(),
        "nvrtc": Nvrtc((13, 0), (90, 100, 103, 120)),
        "sglang": Sglang(num_hooks=11, missing=(), partial=()),
    }
    return Facts(**{**good, **changes})


def with_machine(**changes):
    return facts(machine=replace(MACHINE, **changes))


def with_packages(**changes):
    return facts(packages=replace(PACKAGES, **changes))


def with_version(package, number):
    return with_packages(versions={**PACKAGES.versions, package: number})


def with_cache(**changes):
    return facts(cache=replace(CACHE, **changes))


class FakeDriver:
    """The driver as cuda-python binds it: real names and results, and GPUs that are not there."""

    CUresult = cuda.CUresult
    CUdevice_attribute = cuda.CUdevice_attribute

    def __init__(self, num=2, init="CUDA_SUCCESS", reaches=True, **attributes):
        self.calls = []
        self._num, self._reaches = num, reaches
        self._init = cuda.CUresult[init]
        self._attributes = {
            "MULTIPROCESSOR_COUNT": 132,
            "COMPUTE_CAPABILITY_MAJOR": 9,
            "COMPUTE_CAPABILITY_MINOR": 0,
            "MULTICAST_SUPPORTED": 1,
            **attributes,
        }

    def __getattribute__(self, name):
        if name.startswith("cu"):
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def cuInit(self, flags):
        return (self._init,)

    def cuDriverGetVersion(self):
        return cuda.CUresult.CUDA_SUCCESS, 13010

    def cuDeviceGetCount(self):
        return cuda.CUresult.CUDA_SUCCESS, self._num

    def cuDeviceGet(self, ordinal):
        return cuda.CUresult.CUDA_SUCCESS, cuda.CUdevice(ordinal)

    def cuDeviceGetName(self, length, device):
        return cuda.CUresult.CUDA_SUCCESS, b"NVIDIA H200".ljust(length, b"\0")

    def cuDeviceGetUuid(self, device):
        return cuda.CUresult.CUDA_SUCCESS, SimpleNamespace(bytes=int(device).to_bytes(16))

    def cuDeviceGetAttribute(self, attribute, device):
        name = attribute.name.removeprefix("CU_DEVICE_ATTRIBUTE_")
        return cuda.CUresult.CUDA_SUCCESS, self._attributes.get(name, 1)

    def cuDeviceCanAccessPeer(self, device, peer):
        return cuda.CUresult.CUDA_SUCCESS, int(self._reaches)


class FakeNvml:
    """NVML as nvidia-ml-py binds it, real constants, structures and errors; one H200."""

    def __init__(self, links=(1,) * 18, state=3, status=0, health=0, mig=0, confidential=0):
        self.shut_down = False
        self._links, self._mig, self._confidential = links, mig, confidential
        self._fabric = (state, status, health)

    def __getattr__(self, name):  # what is not faked is the package's own
        return getattr(pynvml, name)

    def nvmlInit(self):
        pass

    def nvmlShutdown(self):
        self.shut_down = True

    def nvmlSystemGetDriverVersion(self):
        return "580.65.06"

    def nvmlSystemGetConfComputeState(self):
        return SimpleNamespace(ccFeature=self._confidential)

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return gpu(handle).uuid

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(free=140 * GIB, total=141 * GIB)

    def nvmlDeviceGetNvLinkState(self, handle, link):
        if link >= len(self._links):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._links[link]

    def nvmlDeviceGetGpuFabricInfoV(self, handle, pointer):
        if self._fabric[0] is None:  # a driver before 535
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        info = pointer._obj
        info.state, info.status, info.healthMask = self._fabric

    def nvmlDeviceGetMigMode(self, handle):
        if self._mig is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [self._mig, self._mig]

    def nvmlDeviceGetVirtualizationMode(self, handle):
        return pynvml.NVML_GPU_VIRTUALIZATION_MODE_NONE
