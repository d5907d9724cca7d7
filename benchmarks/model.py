"""An analytic model of a layer under tensor parallelism: stock, fused, woven, no communication.

On paper only. GEMMs are the planner's (`waves.predicted_us`, fitted on one H200); every other
constant is a data sheet's, a citation's or read from a committed result, and none was adjusted to
the figures that it is compared with. docs/predictions.md states the assumptions and the errors.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from benchmarks.roles import by_size
from benchmarks.roles import ctas as ctas_of
from benchmarks.schema import load
from sglang_tokenweave.waves import GemmShape, predicted_us, transformer_layer

ELEMENT_BYTES = 2
CTAS_BESIDE = (2, 4, 8, 16)  # among which a tuner would choose
CTAS_ALONE = 32
_SHAPE, OP = "h8192-bf16", Path(__file__).parent / "results" / "op-h200x2.json"
# Rows of it that give constants: the SMs are the limit in one, nothing but latency in another; and
# the link's rate.
_BANDWIDTH, _LATENCY, LINK = USED = ((8192, "fused/4"), (1, "fused/32"), (8192, "fused/16"))
# Of the peak of memory: the planner's fit has 4 of an H200's 4.8 TB/s.
_MEMORY_SHARE = 4 / 4.8
# An all-reduce over multicast on two thread blocks of each of 8 H100: 134 MB in 764 us (figure 7 of
# TokenWeave's artefact). Our kernel has not run over multicast; it is taken to do as well.
_MULTICAST_GB_S_PER_CTA = 99
_BESIDE = 1.01  # measured on one H200: GEMMs whose clusters fit beside the communication
_LAUNCH_US = 2.0  # of a small kernel in a CUDA graph
# FlashAttention-3 on H100, forward, causal, head dimension 128: TFLOP/s by tokens of a sequence
# (chart in arXiv 2407.08608); its batches fill the GPU, which short prompts do not.
_ATTENTION_TFLOPS = ((512, 292), (1024, 423), (2048, 521), (4096, 579), (8192, 602), (16384, 616))


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links."""

    name: str
    num_sms: int
    peak_tflops: float  # bf16, dense
    memory_gb_s: float
    unicast_gb_s: float  # per direction, that kernels reach between GPUs
    multicast_gb_s: float  # the same of reductions in the switch

    @property
    def speed(self) -> float:
        """Return an SM's bf16 rate over that of the H200 that the planner's formula fits."""
        return (self.peak_tflops / self.num_sms) / (H200.peak_tflops / H200.num_sms)


# NVLink 4, between two H200: our kernel on 16 thread blocks, 8192 rows of 8192. It is 0.89 of the
# 370 GB/s that NCCL counts on; of NVLink 5 the same share is taken of 722.
H200 = Gpu("H200", 132, 989, 4800, 328, 308)
H100 = Gpu("H100", 132, 989, 3350, 328, 308)
B200 = Gpu("B200", 148, 2250, 8000, 640, 533)
GB200 = Gpu("GB200", 148, 2500, 8000, 640, 533)


@dataclass(frozen=True)
class Model:
    """A transformer, as its configuration says."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int = 1
    top_k: int = 1

    def gemms(self, world_size: int) -> tuple[GemmShape, ...]:
        """Return one rank's GEMMs of a layer: two of the attention, two of the MLP."""
        layer = transformer_layer(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            experts=self.experts,
            top_k=self.top_k,
            world_size=world_size,
        )
        return layer.gemms


LLAMA_70B = Model("Llama-3.3-70B", 80, 8192, 64, 8, 128, 28672)
QWEN_72B = Model("Qwen2.5-72B", 80, 8192, 64, 8, 128, 29568)
MIXTRAL = Model("Mixtral-8x22B", 56, 6144, 48, 8, 128, 16384, experts=8, top_k=2)


@dataclass(frozen=True)
class Setting:
    """What runs where."""

    model: Model
    gpu: Gpu
    world_size: int
    multicast: bool

    def bytes_of(self, tokens: int) -> int:
        """Return the bytes of one rank's activations, S."""
        return tokens * self.model.hidden * ELEMENT_BYTES


@dataclass(frozen=True)
class Times:
    """Microseconds of one layer, its share of what comes before and after the layers left out."""

    stock: float
    fuse: float
    weave: float
    no_comm: float
    ctas: int  # of the communication in `weave`


def layer_times(setting: Setting, tokens: int) -> Times:
    """Predict a layer's times for one prompt of `tokens`, cut in the middle when woven."""
    whole = blocks_us(setting, 0, tokens)
    norm = norm_us(setting, tokens)
    woven = {ctas: _woven_us(setting, tokens, ctas) for ctas in CTAS_BESIDE}
    ctas = min(woven, key=lambda count: woven[count])
    return Times(
        stock=sum(whole) + 2 * (allreduce_us(setting, tokens) + norm),
        fuse=sum(whole) + 2 * fused_us(setting, tokens, CTAS_ALONE),
        weave=woven[ctas],
        no_comm=sum(whole) + 2 * norm,
        ctas=ctas,
    )


def blocks_us(setting: Setting, first: int, last: int, ctas_beside: int = 0) -> tuple[float, float]:
    """Return the computation of attention and MLP over tokens `first` to `last` of a prompt.

    What runs beside `ctas_beside` thread blocks of communication has that many SMs less.
    """
    model, gpu, ranks = setting.model, setting.gpu, setting.world_size
    sms, tokens = gpu.num_sms - ctas_beside, last - first
    qkv, out, gate_up, down = (_gemm_us(gpu, gemm, tokens, sms) for gemm in model.gemms(ranks))
    heads = model.heads // ranks
    rotated = (heads + 2 * max(1, model.kv_heads // ranks)) * model.head_dim
    attention = _attention_us(gpu, heads * model.head_dim, first, last) * gpu.num_sms / sms
    rotate = _memory_us(gpu, 2 * tokens * rotated * ELEMENT_BYTES)
    columns = model.intermediate // ranks * model.top_k
    activate = _memory_us(gpu, 3 * tokens * columns * ELEMENT_BYTES)
    return qkv + rotate + attention + out, gate_up + activate + down


def allreduce_us(setting: Setting, tokens: int) -> float:
    """Return a stock all-reduce that only the link limits."""
    return latency_us() + _link_us(setting, tokens)


def fused_us(setting: Setting, tokens: int, ctas: int) -> float:
    """Return the fused op on `ctas` thread blocks: the slower of the link and these SMs."""
    activations = setting.bytes_of(tokens)
    if setting.multicast:
        moved = link_bytes(activations, setting.world_size, multicast=True)
        sms = moved / (ctas * _MULTICAST_GB_S_PER_CTA) / 1e3
    else:
        sms = sm_bytes(activations, setting.world_size) / (ctas * sm_gb_s()) / 1e3
    return latency_us() + max(_link_us(setting, tokens), sms)


def norm_us(setting: Setting, tokens: int) -> float:
    """Return a residual add and RMSNorm over all rows: two tensors read, two written."""
    return _memory_us(setting.gpu, 4 * setting.bytes_of(tokens))


def sm_bytes(activations: float, world_size: int) -> float:
    """Return what a rank's SMs read and write over unicast: rows of all ranks, and a residual."""
    return activations * (2 + 2 / world_size)


@lru_cache(maxsize=1)
def sm_gb_s() -> float:
    """Return what one thread block of our kernel reads and writes: measured, on two H200."""
    return _moved(_BANDWIDTH) / (_measured_us(_BANDWIDTH) - latency_us()) / 1e3


@lru_cache(maxsize=1)
def latency_us() -> float:
    """Return what an op takes beside its bytes: measured with one row of them."""
    return _measured_us(_LATENCY)


def _measured_us(row: tuple[int, str]) -> float:
    tokens, variant = row
    return by_size(load(OP), _SHAPE)[tokens][variant].time_us


def _moved(row: tuple[int, str]) -> float:
    """Return the bytes that each thread block of a measured row reads and writes."""
    tokens, variant = row
    return sm_bytes(tokens * 8192 * ELEMENT_BYTES, 2) / (ctas_of(variant) or 1)


def link_bytes(activations: float, world_size: int, *, multicast: bool) -> float:
    """Return the bytes per direction and GPU of a reduce-scatter and an all-gather."""
    if multicast:
        return activations * (1 + 1 / world_size)
    return activations * 2 * (world_size - 1) / world_size


def schedule_us(
    computes: tuple[tuple[float, float], ...], sums: tuple[tuple[float, float], ...]
) -> float:
    """Return when a woven pass ends: one stream computes, another sums, each in order.

    Args:
        computes: of each block, the first and the second half's computation.
        sums: of each block, the sums that follow them.
    """
    stream, beside = 0.0, 0.0  # when each is free
    ready = [0.0, 0.0]  # when a half's sum is there
    for block_computes, block_sums in zip(computes, sums, strict=True):
        for half in (0, 1):
            stream = max(stream, ready[half]) + block_computes[half]
            beside = max(beside, stream) + block_sums[half]
            ready[half] = beside
    return max(stream, beside)


def _woven_us(setting: Setting, tokens: int, ctas: int) -> float:
    cut = tokens // 2
    halves = ((0, cut), (cut, tokens))
    (attention_a, mlp_a), (attention_b, mlp_b) = (
        tuple(_BESIDE * block for block in blocks_us(setting, first, last, ctas))
        for first, last in halves
    )
    summed = tuple(fused_us(setting, last - first, ctas) for first, last in halves)
    layers = setting.model.layers
    computes = ((attention_a, attention_b), (mlp_a, mlp_b)) * layers
    last = (summed[0], fused_us(setting, tokens - cut, CTAS_ALONE))
    sums = ((summed[0], summed[1]),) * (2 * layers - 1) + (last,)
    return schedule_us(computes, sums) / layers


def _gemm_us(gpu: Gpu, gemm: GemmShape, tokens: int, sms: int) -> float:
    visits = tokens * gemm.top_k
    moved = ELEMENT_BYTES * (gemm.experts * gemm.n * gemm.k + visits * (gemm.n + gemm.k))
    floor = moved / (_MEMORY_SHARE * gpu.memory_gb_s) / 1e3
    return max(predicted_us(gemm, tokens, sms) / gpu.speed, floor)


def _attention_us(gpu: Gpu, columns: int, first: int, last: int) -> float:
    """Return causal attention of tokens `first` to `last` over all tokens up to them."""
    operations = 4 * columns * (last**2 - first**2) / 2
    rate = _attention_tflops(last) * gpu.peak_tflops / H100.peak_tflops
    return _LAUNCH_US + operations / rate / 1e6


def _attention_tflops(tokens: int) -> float:
    """Return the rate at the largest size of the chart that the sequence reaches."""
    reached = [rate for size, rate in _ATTENTION_TFLOPS if size <= tokens]
    return float(reached[-1] if reached else _ATTENTION_TFLOPS[0][1])


def _memory_us(gpu: Gpu, num_bytes: float) -> float:
    return _LAUNCH_US + num_bytes / (_MEMORY_SHARE * gpu.memory_gb_s) / 1e3


def _link_us(setting: Setting, tokens: int) -> float:
    rate = setting.gpu.multicast_gb_s if setting.multicast else setting.gpu.unicast_gb_s
    moved = link_bytes(setting.bytes_of(tokens), setting.world_size, multicast=setting.multicast)
    return moved / rate / 1e3
