"""What an operator can do about a driver call that failed, by error and, where it matters, call."""

_FABRIC_MANAGER = "`systemctl status nvidia-fabricmanager` and `nvidia-smi -q | grep -A4 Fabric`"
_IMEX = (
    "FABRIC handles need an IMEX channel: give the container "
    "/dev/nvidia-caps-imex-channels/channel0 and run nvidia-imex on every host"
)
_VISIBLE = "CUDA_VISIBLE_DEVICES and `nvidia-smi -L`"

# Beginning of the call's name, error, remedy; the first that fits counts.
_REMEDIES = (
    ("cuMemCreate", "NOT_PERMITTED", _IMEX),
    ("cuMemExportToShareableHandle", "NOT_PERMITTED", _IMEX),
    (
        "cuMemImportFromShareableHandle",
        "NOT_PERMITTED",
        f"{_IMEX}; both ranks need the same channel",
    ),
    (
        "cuMulticast",
        "NOT_PERMITTED",
        "the container or virtual machine withholds NVSwitch multicast (IMEX channel, fabric)",
    ),
    (
        "cuMulticast",
        "NOT_SUPPORTED",
        "no NVSwitch multicast here (no NVSwitch, a virtual or partitioned GPU, or confidential "
        "computing)",
    ),
    (
        "cuMulticast",
        "INVALID_VALUE",
        "sizes or handle types do not fit the multicast object, or the fabric manager was "
        "restarted without resetting the GPUs",
    ),
    (
        "cuMulticast",
        "INVALID_DEVICE",
        "the GPUs are not in one NVLink domain: check `nvidia-smi topo -m`",
    ),
    (
        "cuMulticast",
        "OUT_OF_MEMORY",
        "NVSwitch has no room for another multicast object: stop other multi-GPU jobs of this host",
    ),
    ("cuMem", "INVALID_VALUE", "a size or address misses the granularity, or handle types differ"),
    (
        "cuMemExportToShareableHandle",
        "NOT_SUPPORTED",
        "the driver does not share memory in this way (WSL, a virtual GPU)",
    ),
    (
        "cuMemSetAccess",
        "INVALID_DEVICE",
        "no peer access between the GPUs: check `nvidia-smi topo -p2p rw`",
    ),
    ("", "NOT_PERMITTED", "this container lacks a permission that the call needs"),
    ("", "NOT_SUPPORTED", "the GPU or its driver lacks this feature"),
    ("", "OUT_OF_MEMORY", "free GPU memory, or lower --mem-fraction-static"),
    ("", "PEER_ACCESS_UNSUPPORTED", "no peer access: check `nvidia-smi topo -p2p rw`"),
    (
        "",
        "ILLEGAL_STATE",
        f"NVSwitch is in a bad state: check {_FABRIC_MANAGER}, then restart it and reset the GPUs",
    ),
    (
        "",
        "SYSTEM_NOT_READY",
        f"the fabric manager is starting or not running: check {_FABRIC_MANAGER}",
    ),
    ("", "INVALID_DEVICE", f"no such GPU here: check {_VISIBLE}"),
    ("", "NO_DEVICE", f"no GPU here: check {_VISIBLE}, and the container's --gpus option"),
    (
        "",
        "SYSTEM_DRIVER_MISMATCH",
        "the driver's libraries in the container do not match the host's driver",
    ),
    ("", "LAUNCH_FAILED", "a kernel stopped itself: its message is in this process's output"),
)


def remedy(call: str, error: str) -> str | None:
    """Return what to do when the driver function `call` returned `error` ("CUDA_ERROR_...")."""
    for prefix, suffix, text in _REMEDIES:
        if call.startswith(prefix) and error == f"CUDA_ERROR_{suffix}":
            return text
    return None
