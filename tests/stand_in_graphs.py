"""Stand-ins for SGLang's runners of graphs, and for what a runtime knows of them.

SGLang captures on GPUs only. Used of a runner are its list of sizes, its `capture` and the
dictionaries of its backend.
"""

import pkgutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from sglang_tokenweave.plan import Kind, Mode, PlanRow, PlanTable
from sglang_tokenweave.runtime import Runtime
from sglang_tokenweave.waves import GemmShape, LayerShape
from sglang_tokenweave.weave import Stage

NOTHING = PlanTable(())
LAYER = LayerShape((GemmShape("g", n=1024, k=1024),))


def is_capturing():
    return pkgutil.resolve_name(
        "sglang.srt.model_executor.runner_utils.capture_mode:get_is_capture_mode"
    )()


@dataclass(frozen=True)
class OurModel:
    """The part of a runtime's Model that is used here."""

    place: Any
    inner: Any
    stages: tuple[Stage, ...]
    layer: LayerShape = LAYER
    num_sms: int = 132


def model_of(group, layers=4):
    place = SimpleNamespace(group=SimpleNamespace(cpu_group=group), is_whole=True)
    modules = torch.nn.ModuleList(torch.nn.Identity() for _ in range(layers))
    inner = SimpleNamespace(start_layer=0, end_layer=layers, layers=modules)
    names = ("embedding", *(f"{part} {i}" for i in range(layers) for part in ("attn", "mlp")))
    return OurModel(place, inner, tuple(Stage(name, f"norm after {name}") for name in names))


class OurRuntime(SimpleNamespace):
    """The part of a Runtime that knows what is in SGLang's graphs."""

    kind_in_graph = Runtime.kind_in_graph
    plan_in_graph = Runtime.plan_in_graph

    def __init__(self, group=None, layers=4):
        super().__init__(
            table=NOTHING,
            graphs=None,
            stats=None,
            kinds_in_graphs={},
            cuts_captured_decodes=True,
            buffer=SimpleNamespace(capacity=512),
            model=model_of(group, layers),
        )


class Runner:
    """Captures what the runtime plans for each of its sizes: a kind and its CTAs."""

    def __init__(self, mode, sizes_name, sizes, runtime):
        self.mode, self.sizes_name, self.runtime = mode, sizes_name, runtime
        self.backend = SimpleNamespace(graphs={}, outputs={}, pool="a pool")
        self.fails_at = None
        self.depths = {}  # layers of each size's last capture
        self.said_so = False  # that it captures, as SGLang's code asks
        self.is_done = True  # what runs beside its graphs' pieces while they are captured
        setattr(self, sizes_name, sizes)
        self.capture()

    def capture(self):
        self.said_so = is_capturing()
        self.is_done = False
        for size in reversed(getattr(self, self.sizes_name)):
            plan = self.runtime.plan_in_graph(self.mode, size)
            self.runtime.kinds_in_graphs[self.mode, size] = plan.kind
            if size == self.fails_at:
                raise MemoryError("no memory left")
            self.backend.graphs[size] = (plan.kind, plan.fuse_ctas)
            self.depths[size] = self.runtime.model.inner.end_layer
            self.backend.outputs[size] = f"rows of {size}"


def server(runtime, table=NOTHING):
    """Return a ModelRunner whose graphs were captured with a table."""
    runtime.table = table
    return SimpleNamespace(
        device="cuda",
        attn_backend=SimpleNamespace(use_sliding_window_kv_pool=False),
        sliding_window_size=None,
        prefill_attention_backend_str="fa3",
        prefill_cuda_graph_runner=Runner(
            Mode.PREFILL, "capture_num_tokens", [64, 128, 512], runtime
        ),
        decode_cuda_graph_runner=Runner(Mode.DECODE, "capture_bs", [1, 2, 4], runtime),
    )


def fuse_from(tokens, mode=Mode.PREFILL, ctas=16):
    return PlanTable((PlanRow(mode, tokens, Kind.FUSE, fuse_ctas=ctas),))
