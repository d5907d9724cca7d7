"""Figures of TokenWeave's artefact, to hold predictions against.

From https://github.com/microsoft/tokenweave (commit f483d1c, MIT licence), artifact/csvs, rounded;
8 H100 (DGX) and 4 of them, bf16, vLLM 0.8.5, its all-reduce over NVSwitch multicast.
"""

from typing import NamedTuple


class Prefill(NamedTuple):
    """Milliseconds of one prompt, figures 11a and 11b."""

    stock: float  # "baseline_multimem"
    no_comm: float  # "no_ar": the same without its all-reduces
    weave: float  # "overlap_fused"


TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# By model and number of ranks, in the order of TOKENS.
PREFILL_MS = {
    ("Llama-3.3-70B", 8): (
        Prefill(53.7, 41.9, 46.2),
        Prefill(94.2, 74.9, 76.7),
        Prefill(179.5, 144.9, 142.2),
        Prefill(356.0, 289.5, 279.8),
        Prefill(744.1, 610.2, 585.3),
        Prefill(1639.9, 1371.4, 1326.0),
        Prefill(3917.7, 3338.3, 3282.4),
    ),
    ("Qwen2.5-72B", 8): (
        Prefill(54.3, 42.5, 47.6),
        Prefill(97.1, 77.8, 79.0),
        Prefill(183.3, 149.1, 146.7),
        Prefill(358.5, 292.6, 288.4),
        Prefill(754.6, 624.0, 607.9),
        Prefill(1656.1, 1393.4, 1368.8),
        Prefill(3977.6, 3410.3, 3219.8),
    ),
    ("Mixtral-8x22B", 8): (
        Prefill(42.9, 36.4, 69.1),
        Prefill(68.2, 57.1, 69.9),
        Prefill(121.4, 102.2, 107.7),
        Prefill(230.7, 195.6, 199.4),
        Prefill(471.0, 405.1, 399.2),
        Prefill(1024.0, 891.3, 874.9),
        Prefill(2383.1, 2109.8, 2104.2),
    ),
    ("Llama-3.3-70B", 4): (
        Prefill(82.2, 70.8, 72.5),
        Prefill(150.6, 132.5, 137.1),
        Prefill(295.2, 257.2, 261.9),
        Prefill(609.6, 531.5, 529.5),
        Prefill(1288.3, 1130.4, 1125.9),
        Prefill(2880.8, 2546.3, 2558.8),
        Prefill(7063.8, 6333.1, 6374.8),
    ),
    ("Qwen2.5-72B", 4): (
        Prefill(83.1, 72.7, 74.3),
        Prefill(156.4, 139.0, 140.8),
        Prefill(298.5, 260.0, 272.2),
        Prefill(621.9, 544.8, 535.6),
        Prefill(1314.2, 1154.9, 1158.0),
        Prefill(2938.3, 2593.9, 2620.4),
        Prefill(6869.2, 6154.5, 6473.7),
    ),
}


class Op(NamedTuple):
    """Microseconds on 8 H100 at hidden size 8192, figure 4."""

    norm: float  # residual add and RMSNorm of all rows
    allreduce: float  # over multicast
    fused: float  # the best number of thread blocks


OP_US = {
    64: Op(8.4, 16.5, 17.1),
    256: Op(11.9, 28.1, 30.1),
    1024: Op(29.9, 74.8, 75.4),
    2048: Op(51.8, 135.9, 137.1),
    4096: Op(96.3, 257.2, 258.2),
    8192: Op(184.2, 500.2, 502.3),
    16384: Op(361.1, 986.0, 987.3),
    32768: Op(712.4, 1956.6, 1965.6),
}
# Their fused kernel at 8192 tokens by thread blocks, figure 10.
FUSED_8192_US = {2: 1571.1, 4: 913.8, 8: 561.7, 16: 503.5, 32: 502.3}
