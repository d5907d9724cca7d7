"""What SGLang needs to serve on a machine without a GPU: its environment and its flags.

The launch scripts and the tests start real servers this way. Nothing here is applied on import, and
nothing of it is read by the extension itself: it is the recipe for a *server process*.
"""

import os
from typing import Any


def environment(tp_size: int) -> dict[str, str]:
    """Return the environment variables of a CPU server with `tp_size` ranks.

    Merge them over the environment of the process to start; SGLang reads some at import.

    Raises:
        ValueError: `tp_size` is below 1.
    """
    return {
        "SGLANG_USE_CPU_ENGINE": "1",
        # Models come from a folder, so a forgotten model must fail and not download.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # One thread a rank: ranks share the cores, and sums keep one order.
        "OMP_NUM_THREADS": "1",
        # gloo looks the host name up otherwise, which fails on a machine without a network.
        "GLOO_SOCKET_IFNAME": "lo",
        # A CUDA build of torch brings NCCL, and SGLang would open it on the CPU and fail: this name
        # is no library, so SGLang goes on without (and says so in its log).
        "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu",
        # At TP > 1 SGLang would compile with inductor: twice the start-up, and it needs g++.
        "TORCHDYNAMO_DISABLE": "1",
        # When a rank has failed and another one still runs, SGLang ends the server a minute later:
        # it waits for a core dump of CUDA, and the clients with it.
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        # SGLang refuses more ranks than NUMA nodes unless each rank's cores are named.
        "SGLANG_CPU_OMP_THREADS_BIND": _cores_per_rank(tp_size, sorted(os.sched_getaffinity(0))),
    }


def server_arguments(tp_size: int) -> list[str]:
    """Return SGLang's flags for a CPU server with `tp_size` ranks, all but model, host and port.

    A flag given again later on the command line wins.
    """
    options = engine_arguments(tp_size)
    options["tp"] = options.pop("tp_size")
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return [text for flag in flags for text in flag]


def engine_arguments(tp_size: int) -> dict[str, Any]:
    """Return the same as arguments of the offline Engine, all but the model.

    Sized for the demo model and those of `sglang_tokenweave.tiny_model`.
    """
    return {
        "device": "cpu",
        "tp_size": tp_size,
        # The only backends that need no compiled kernel.
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        # `auto` would turn a float32 checkpoint into float16; in float32 greedy tokens are equal at
        # every TP size, in bfloat16 rounding decides.
        "dtype": "float32",
        # SGLang cannot tell a rank's memory once its cores are named: so many tokens it may hold.
        "max_total_tokens": 8192,
        "chunked_prefill_size": 512,
        "mem_fraction_static": 0.3,
    }


def _cores_per_rank(tp_size: int, cores: list[int]) -> str:
    if tp_size < 1:
        raise ValueError(f"tp_size={tp_size}: at least one rank is needed")
    shares = [cores[rank::tp_size] or [cores[rank % len(cores)]] for rank in range(tp_size)]
    return "|".join(",".join(map(str, share)) for share in shares)
