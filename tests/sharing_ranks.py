"""Several ranks make and close a PeerMemory on a model of the driver."""

import os
from dataclasses import dataclass, field

import torch
from driver_model import DriverModel
from in_process import World

from sglang_tokenweave import driver, multicast
from sglang_tokenweave.symmetric import PeerMemory

NUM_BYTES = 3 << 20
SWITCHES = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
UNDOING = (
    "cuMemRelease",
    "cuMemUnmap",
    "cuMemAddressFree",
    "cuMulticastUnbind",
    "cuCtxPopCurrent",
    "cuDevicePrimaryCtxRelease",
)


@dataclass(frozen=True)
class Got:
    """What one rank saw of a memory that was made."""

    num_addresses: int
    multicast_address: int | None
    why_no_multicast: str | None
    size: int


@dataclass
class Session:
    """What came of it."""

    model: DriverModel
    outcomes: list  # by rank: a Got or an exception
    made: dict = field(default_factory=dict)  # by rank: the calls until the memory was made
    leaked_descriptors: int = 0

    @property
    def got(self):
        """Return what the ranks saw, where all of them succeeded."""
        for outcome in self.outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return self.outcomes

    def check_clean(self):
        """Nothing undefined happened and nothing is left."""
        assert not self.model.violations
        assert not self.model.leftovers()
        assert self.leaked_descriptors == 0


def share(monkeypatch, world_size, *, num_bytes=NUM_BYTES, use_multicast=True, **options):
    """Run the ranks to their end.

    `options` are the model's, and `across_hosts`, `ordinals` (of each rank's device), `switches`
    (environment variables against multicast).
    """
    switches = options.pop("switches", {})
    across_hosts = options.pop("across_hosts", False)
    ordinals = options.pop("ordinals", range(world_size))
    sizes = num_bytes if isinstance(num_bytes, list) else [num_bytes] * world_size
    world = World(world_size)
    model = DriverModel(world, forbidden=bool(switches), **options)
    monkeypatch.setattr(driver, "bindings", lambda: model)
    monkeypatch.setattr(multicast, "_PAUSES_S", (0.0, 0.0, 0.0))
    for name in SWITCHES:  # the machine may have set them, and the model has no real switch
        monkeypatch.delenv(name, raising=False)
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    made = {}

    def rank(group):
        memory = PeerMemory(
            sizes[group.rank],
            torch.device("cuda", ordinals[group.rank]),
            group,
            use_multicast=use_multicast,
            across_hosts=across_hosts,
        )
        made[group.rank] = model.calls(group.rank)
        own = model.mapped[group.rank, memory.addresses[group.rank]]
        assert own.thing.is_zeroed
        got = Got(
            len(set(memory.addresses)),
            memory.multicast_address,
            memory.why_no_multicast,
            own.size,
        )
        memory.close()
        return got

    before = len(os.listdir("/proc/self/fd"))
    outcomes = world.run(rank)
    after = len(os.listdir("/proc/self/fd"))
    return Session(model, outcomes, made, after - before)
