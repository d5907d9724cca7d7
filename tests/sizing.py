"""The arithmetic of docs/scaling.md: run this file to print the page's tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BYTES = 2  # of a weight, an activation and an entry of the KV cache: bf16
MEMORY_SHARE = 0.88  # of a GPU for weights and KV cache; SGLang keeps about the rest
WEIGHT_SHARE = 2 / 3  # of that for weights at most, or too few requests fit beside them
HOST = 8  # GPUs
NVLINK = 370e9  # bytes per second and direction that a GPU of an H100 or H200 host reaches
NIC = 50e9  # bytes per second and direction of 400 Gbit/s; one NIC per GPU
BATCH = 4096  # tokens


@dataclass(frozen=True)
class Model:
    """Dimensions, as in the model's config.json."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of one expert, if there are several
    vocabulary: int
    experts: int = 1

    @property
    def parameters(self) -> int:
        """Return the weights, without those of norms and routers (below 0.1 %)."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        feed_forward = 3 * self.hidden * self.intermediate * self.experts
        return self.layers * (attention + feed_forward) + 2 * self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> int:
        return BYTES * self.parameters

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of KV cache per token, of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES

    def all_reduce_bytes(self, tp: int) -> float:
        """Return what a GPU sends per token and layer: two all-reduces, each in two steps."""
        return 2 * 2 * (tp - 1) / tp * self.hidden * BYTES

    def boundary_bytes(self, tp: int) -> float:
        """Return what a GPU sends per token to the next stage: its share of two tensors."""
        return 2 * self.hidden * BYTES / tp


@dataclass(frozen=True)
class Machine:
    """GPUs that NVLink joins."""

    name: str
    gpus: int
    memory: float  # bytes per GPU

    @property
    def budget(self) -> float:
        return MEMORY_SHARE * self.memory


@dataclass(frozen=True)
class Layout:
    """Tensor-parallel ranks times pipeline stages, one replica."""

    tp: int
    pp: int = 1

    def kv_tokens(self, model: Model, machine: Machine) -> int:
        """Return the tokens of KV cache that a replica holds."""
        free = machine.budget - model.weight_bytes / (self.tp * self.pp)
        # With fewer KV heads than ranks, several ranks hold the same head.
        per_token = model.kv_bytes / self.pp / min(self.tp, model.kv_heads)
        return int(free / per_token)


MODELS = (
    Model("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256),
    Model("Llama-3.3-70B", 80, 8192, 64, 8, 128, 28672, 128256),
    Model("Mixtral-8x22B", 56, 6144, 48, 8, 128, 16384, 32768, experts=8),
    Model("Qwen3-235B-A22B", 94, 4096, 64, 4, 128, 1536, 151936, experts=128),
)
MACHINES = tuple(
    Machine(f"{gpus}x{name}", gpus, memory * 1e9)
    for name, memory in (("H100", 80), ("H200", 141), ("B200", 180))
    for gpus in (2, 8)
)


def smallest_layout(model: Model, machine: Machine, hosts: int = 1) -> Layout | None:
    """Return the layout of the fewest GPUs that leaves room to requests; TP stays in a host."""
    layouts = [Layout(tp) for tp in (1, 2, 4, 8) if tp <= machine.gpus]
    layouts += [Layout(machine.gpus, pp) for pp in range(2, hosts + 1)]
    for layout in layouts:
        share = model.weight_bytes / (layout.tp * layout.pp)
        if share <= WEIGHT_SHARE * machine.budget:
            return layout
    return None


def memory_table() -> str:
    rows = [
        (m.name, f"{m.parameters / 1e9:.1f} G", f"{m.weight_bytes / 1e9:.0f} GB", f"{m.kv_bytes:,}")
        for m in MODELS
    ]
    return _table(("model", "parameters", "weights, bf16", "KV bytes per token"), rows)


def layout_table() -> str:
    rows = [(m.name, *(_layout_cell(m, machine) for machine in MACHINES)) for m in MODELS]
    return _table(("model", *(machine.name for machine in MACHINES)), rows)


def _layout_cell(model: Model, machine: Machine) -> str:
    layout = smallest_layout(model, machine)
    if layout is None:
        return "-"
    replicas = machine.gpus // layout.tp
    return f"{replicas} x TP{layout.tp}, {layout.kv_tokens(model, machine) / 1e3:,.0f}K"


def volume_table() -> str:
    rows = [
        (
            m.name,
            *(f"{m.all_reduce_bytes(tp) / 1e3:.1f}" for tp in (2, 4, 8)),
            f"{m.layers * m.all_reduce_bytes(8) / 1e6:.2f}",
            f"{m.boundary_bytes(8) / 1e3:.1f}",
        )
        for m in MODELS
    ]
    head = ("model", "layer, TP2, kB", "TP4", "TP8", "all layers, TP8, MB", "boundary, TP8, kB")
    return _table(head, rows)


def network_table() -> str:
    rows = []
    for m in MODELS:
        inside = m.layers * BATCH * m.all_reduce_bytes(HOST) / NVLINK
        # Hierarchical: a GPU all-reduces its eighth with its peer of the other host.
        across = m.layers * BATCH * m.all_reduce_bytes(2) / HOST / NIC
        boundary = BATCH * m.boundary_bytes(HOST) / NIC
        times = (f"{1e3 * inside:.1f}", f"{1e3 * across:.1f}", f"{1e3 * boundary:.2f}")
        rows.append((m.name, *times, f"{across / boundary:.0f}"))
    head = ("model", "TP8 in a host, NVLink", "TP16 on two, NICs", "TP8 x PP2, NICs", "NIC ratio")
    return _table(head, rows)


def fill_table() -> str:
    chunks = (1, 2, 4, 8, 16, 32)
    rows = [
        (f"PP{pp}", *(f"{100 * count / (count + pp - 1):.0f} %" for count in chunks))
        for pp in (2, 4)
    ]
    return _table(("chunks in flight", *map(str, chunks)), rows)


def fleet_table(num_gpus: int = 1000) -> str:
    machines = [machine for machine in MACHINES if machine.gpus == HOST]
    rows = [(m.name, *(_fleet_cell(m, machine, num_gpus) for machine in machines)) for m in MODELS]
    return _table(("model", *(machine.name.removeprefix("8x") for machine in machines)), rows)


def _fleet_cell(model: Model, machine: Machine, num_gpus: int) -> str:
    layout = smallest_layout(model, machine, hosts=4)
    assert layout is not None
    replicas = num_gpus // (layout.tp * layout.pp)
    stages = f" x PP{layout.pp}" if layout.pp > 1 else ""
    tokens = replicas * layout.kv_tokens(model, machine)
    return f"{replicas} x TP{layout.tp}{stages}, {tokens / 1e6:,.0f}M"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


TABLES = (memory_table, layout_table, volume_table, network_table, fill_table, fleet_table)

if __name__ == "__main__":
    for table in TABLES:
        print(f"{table()}\n")
