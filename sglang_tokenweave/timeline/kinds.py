"""Which activities of a GPU are communication: a table of their names."""

import re
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What an activity does."""

    COMPUTATION = "computation"
    SUM = "sum"  # all-reduce, with or without what follows it
    OTHER = "other"  # gathers, scatters, broadcasts: no layer of a tensor-parallel model has them
    COPY = "copy"  # by a copy engine to or from another GPU
    NORM = "norm"  # between the copies of one sum
    FLAGS = "flags"  # ranks tell each other how far they are
    MEMORY = "memory"  # a copy or fill within this GPU, or from and to the host


class Label(NamedTuple):
    """A name's kind, and whose kernel it is."""

    kind: Kind
    family: str


_OURS, _NCCL, _SGLANG = "tokenweave", "NCCL", "SGLang"
_TORCH, _FLASHINFER, _UNKNOWN = "torch", "flashinfer", "unknown library"
# The first that is found decides. Kineto gives names demangled, or mangled where it cannot.
PATTERNS: tuple[tuple[str, Label], ...] = (
    (r"allreduce_rmsnorm|oneshot_rmsnorm|twoshot_rmsnorm", Label(Kind.SUM, _OURS)),
    (r"(?<![A-Za-z_])add_rmsnorm", Label(Kind.NORM, _OURS)),  # not fused_add_rmsnorm
    (r"(?<![A-Za-z_])exchange_flags", Label(Kind.FLAGS, _OURS)),
    (r"^nccl.*AllReduce", Label(Kind.SUM, _NCCL)),
    (r"^nccl", Label(Kind.OTHER, _NCCL)),
    (r"cross_device_reduce_\dstage", Label(Kind.SUM, _SGLANG)),
    (r"all_reduce_\dshot_(push|pull)_kernel", Label(Kind.SUM, _SGLANG)),
    (r"all_reduce_(push|pull)_\w*kernel|moe_finalize_all_reduce", Label(Kind.SUM, _SGLANG)),
    (r"quickreduce::\w*allreduce", Label(Kind.SUM, _SGLANG)),
    (r"flashinfer.*allreduce|allreduce_fusion_kernel", Label(Kind.SUM, _FLASHINFER)),
    (r"(one|two)shotAllreduce", Label(Kind.SUM, _FLASHINFER)),
    (r"(one_shot|two_shot|multimem)\w*_reduce(_push)?_kernel", Label(Kind.SUM, _TORCH)),
    (r"multimem_all_gather_kernel", Label(Kind.OTHER, _TORCH)),
    (r"(barrier|put_signal|wait_signal)_kernel", Label(Kind.FLAGS, _TORCH)),
    (r"(?i)all_?reduce", Label(Kind.SUM, _UNKNOWN)),
    (r"(?i)all_?gather|reduce_?scatter|all_?to_?all|nvshmem", Label(Kind.OTHER, _UNKNOWN)),
)
_TABLE = [(re.compile(pattern), label) for pattern, label in PATTERNS]
# FlashAttention 2 and 3, flashinfer, TensorRT-LLM and cuDNN, Triton in SGLang.
_ATTENTION = re.compile(
    r"(?i)flash_fwd|FlashAttnFwd|(prefill|decode)With|fmha|sdpa|attention|attn|^_fwd_kernel"
)
_BESIDE_ATTENTION = re.compile(r"(?i)combine|merge|prepare_varlen|stage2|quant|rope|norm")
_ACTIVATION = re.compile(r"(?i)act_and_mul|silu|gelu|swiglu")


def label(name: str, category: str) -> Label:
    """Return what an activity is; `category` is Kineto's `cat`."""
    if category == "gpu_memcpy":
        # To another GPU's memory by its own address; see `operations` for the other way to write it
        peer = name.startswith("Memcpy PtoP")
        return Label(Kind.COPY, "peer copy") if peer else Label(Kind.MEMORY, "")
    if category == "gpu_memset":
        return Label(Kind.MEMORY, "")
    for pattern, found in _TABLE:
        if pattern.search(name):
            return found
    return Label(Kind.COMPUTATION, "")


def is_attention(name: str) -> bool:
    """Whether a computation is the attention over keys and values, once a layer and part."""
    return bool(_ATTENTION.search(name)) and not _BESIDE_ATTENTION.search(name)


def is_activation(name: str) -> bool:
    """Whether a computation is the activation of a feed-forward block, once a layer and part."""
    return bool(_ACTIVATION.search(name))
