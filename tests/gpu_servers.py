"""What all servers on GPUs have in common in these tests: a model, flags, an environment."""

# Tiny, but with heads that the attention kernels of a GPU take.
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
WEAVE = ("--tokenweave-transport", "peer", "--tokenweave-min-tokens", "200")
# The harness' own are those of a server on a CPU.
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "0", "SGLANG_NCCL_SO_PATH": ""}
