"""The CUDA driver's rules for memory that processes share, as a model that ranks in threads call.

It stands in for `cuda.bindings.driver`: types and constants are the real ones, calls are modelled.
What the real driver answers with an error returns that error; what it leaves undefined (a double
free, a plain access to multicast memory, ...) is a RuleViolation, which no code under test catches.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

from cuda.bindings import driver as real
from in_process import KilledError

MIB = 1 << 20
GRANULARITY = 2 * MIB
MULTICAST_MINIMUM, MULTICAST_RECOMMENDED = 4 * MIB, 16 * MIB
POSIX = real.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
FABRIC = real.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_FABRIC
KILL = "kill"


class RuleViolation(BaseException):
    """Something that the driver leaves undefined."""


class _Refused(Exception):
    def __init__(self, error):
        self.status = getattr(real.CUresult, f"CUDA_ERROR_{error}")


@dataclass
class Gpu:
    has_multicast: bool = True
    has_fabric: bool = True
    reaches: frozenset | None = None  # of GPUs by number; None: all


@dataclass(eq=False)
class Memory:
    size: int
    handle_type: object
    gpu: int
    granularity: int = GRANULARITY
    is_zeroed: bool = False


@dataclass(eq=False)
class Multicast:
    size: int
    handle_type: object
    num_devices: int
    granularity: int = MULTICAST_MINIMUM
    gpus: set = field(default_factory=set)
    bound: dict = field(default_factory=dict)  # GPU: its memory

    @property
    def is_complete(self):
        return len(self.gpus) == self.num_devices

    def empty_copy(self):
        return Multicast(self.size, self.handle_type, self.num_devices)


@dataclass(eq=False)
class Mapping:
    thing: Memory | Multicast
    size: int
    accessible: bool = False


class DriverModel:
    """One host: its GPUs, and what the processes of all ranks hold of the driver."""

    def __init__(self, world, *, gpus=None, visible=None, imex=True, forbidden=False, faults=()):
        """Model a host.

        Args:
            gpus: one for each rank by default.
            visible: per rank, which GPUs it sees, in the order of its ordinals; all by default.
            imex: whether containers have an IMEX channel.
            forbidden: whether an operator's switch is set.
            faults: {(rank, call, n): error}: what the n-th such call of a rank fails with, from 1;
                n = 0 for all of them. KILL ends the rank there.
        """
        self._world = world
        self.gpus = gpus or [Gpu() for _ in range(world.world_size)]
        self._visible = visible or [range(len(self.gpus))] * world.world_size
        self._imex, self._forbidden, self._faults = imex, forbidden, dict(faults)
        self.trace = []  # (rank, call)
        self.violations = []
        self.handles = {}  # (rank, number): thing
        self.reserved = {}  # (rank, address): (size, alignment)
        self.mapped = {}  # (rank, address): Mapping
        self.contexts = Counter()  # (rank, GPU): references
        self.current = {rank: [] for rank in range(world.world_size)}
        self.memories = []
        self._failed = []  # (call, rank, arguments), of injected faults
        self._shared = {}  # inode of a descriptor, or bytes of a FABRIC handle: thing
        self._counts = Counter()
        self._last_number, self._next_address = 0, 1 << 40

    def leftovers(self):
        """Return what is still held, as text."""
        stacks = {rank: stack for rank, stack in self.current.items() if stack}
        references = {key: count for key, count in self.contexts.items() if count}
        held = [self.handles, self.reserved, self.mapped, references, stacks]
        return [str(each) for each in held if each]

    def calls(self, rank):
        return [name for caller, name in self.trace if caller == rank]

    def __getattr__(self, name):
        if name.startswith("cu") and name[2].isupper():
            return partial(self._call, name)
        return getattr(real, name)

    def _call(self, name, *arguments):
        rank = self._world.rank
        with self._world.changed:
            self.trace.append((rank, name))
            self._counts[rank, name] += 1
            if self._forbidden and name.startswith("cuMulticast"):
                self._violate(f"{name} is called although a switch forbids it")
            n = self._counts[rank, name]
            fault = self._faults.get((rank, name, n), self._faults.get((rank, name, 0)))
            if fault == KILL:
                raise KilledError(f"rank {rank} ends in {name}")
            if fault:
                self._failed.append((name, rank, *arguments))
                return (getattr(real.CUresult, f"CUDA_ERROR_{fault}"),)
            try:
                values = getattr(self, f"_{name}")(rank, *arguments)
            except _Refused as refused:
                return (refused.status,)
            self._world.changed.notify_all()
            return (real.CUresult.CUDA_SUCCESS, *([] if values is None else [values]))

    def _violate(self, text):
        self.violations.append(text)
        raise RuleViolation(text)

    # Devices and contexts. A CUdevice is the ordinal in the calling process.

    def _gpu(self, rank, ordinal):
        if not 0 <= ordinal < len(self._visible[rank]):
            raise _Refused("INVALID_DEVICE")
        return self._visible[rank][ordinal]

    def _cuInit(self, rank, flags):
        pass

    def _cuDeviceGet(self, rank, ordinal):
        self._gpu(rank, ordinal)
        return ordinal

    def _cuDeviceGetCount(self, rank):
        return len(self._visible[rank])

    def _cuDeviceGetUuid(self, rank, ordinal):
        # Not a CUuuid: its bytes cannot be set.
        return SimpleNamespace(bytes=self._gpu(rank, ordinal).to_bytes(16, "big"))

    def _cuDeviceGetAttribute(self, rank, attribute, ordinal):
        gpu = self.gpus[self._gpu(rank, ordinal)]
        name = attribute.name.removeprefix("CU_DEVICE_ATTRIBUTE_")
        known = {
            "MULTICAST_SUPPORTED": gpu.has_multicast,
            "HANDLE_TYPE_FABRIC_SUPPORTED": gpu.has_fabric,
        }
        return int(known[name])

    def _cuDeviceCanAccessPeer(self, rank, ordinal, peer):
        return int(self._reaches(self._gpu(rank, ordinal), self._gpu(rank, peer)))

    def _reaches(self, gpu, other):
        reaches = self.gpus[gpu].reaches
        return reaches is None or other in reaches or other == gpu

    def _cuDevicePrimaryCtxRetain(self, rank, ordinal):
        self.contexts[rank, self._gpu(rank, ordinal)] += 1
        return ("context", self._gpu(rank, ordinal))

    def _cuDevicePrimaryCtxRelease(self, rank, ordinal):
        gpu = self._gpu(rank, ordinal)
        if not self.contexts[rank, gpu]:
            self._violate("a context is released that is not retained")
        self.contexts[rank, gpu] -= 1

    def _cuDevicePrimaryCtxGetState(self, rank, ordinal):
        return (0, int(self.contexts[rank, self._gpu(rank, ordinal)] > 0))

    def _cuCtxPushCurrent(self, rank, context):
        self.current[rank].append(context)

    def _cuCtxPopCurrent(self, rank):
        return self.current[rank].pop()

    def _cuCtxSynchronize(self, rank):
        if not self.current[rank]:
            raise _Refused("INVALID_CONTEXT")

    # Memory.

    def _handle(self, rank, thing):
        self._last_number += 1
        self.handles[rank, self._last_number] = thing
        return self._last_number

    def _thing(self, rank, handle):
        if (rank, handle) not in self.handles:
            self._violate(f"rank {rank} uses handle {handle}, which it does not hold")
        return self.handles[rank, handle]

    def _cuMemGetAllocationGranularity(self, rank, properties, option):
        return GRANULARITY

    def _cuMemCreate(self, rank, size, properties, flags):
        handle_type = properties.requestedHandleTypes
        if size <= 0 or size % GRANULARITY or flags:
            raise _Refused("INVALID_VALUE")
        if handle_type == FABRIC and not self._imex:
            raise _Refused("NOT_PERMITTED")
        memory = Memory(size, handle_type, self._gpu(rank, properties.location.id))
        self.memories.append(memory)
        return self._handle(rank, memory)

    def _cuMemRelease(self, rank, handle):
        self._thing(rank, handle)
        del self.handles[rank, handle]

    def _cuMemExportToShareableHandle(self, rank, handle, handle_type, flags):
        thing = self._thing(rank, handle)
        if thing.handle_type != handle_type or flags:
            raise _Refused("INVALID_VALUE")
        if handle_type == FABRIC:
            shared = real.CUmemFabricHandle()
            shared.data = id(thing).to_bytes(64, "big")
            self._shared[bytes(shared.data)] = thing
            return shared
        descriptor = os.memfd_create("shared")
        self._shared[os.fstat(descriptor).st_ino] = thing
        return descriptor

    def _cuMemImportFromShareableHandle(self, rank, shared, handle_type):
        key = bytes(shared) if handle_type == FABRIC else self._inode(shared)
        thing = self._shared.get(key)
        if thing is None or thing.handle_type != handle_type:
            raise _Refused("INVALID_VALUE")
        is_held = thing in self.handles.values() or any(
            mapping.thing is thing for mapping in self.mapped.values()
        )
        if isinstance(thing, Multicast) and not is_held:
            thing = thing.empty_copy()  # the creator let go: this is not what the others have
        return self._handle(rank, thing)

    def _inode(self, descriptor):
        try:
            return os.fstat(descriptor).st_ino
        except OSError:
            self._violate(f"descriptor {descriptor} is imported after it was closed")

    def _cuMemAddressReserve(self, rank, size, alignment, address, flags):
        if size <= 0 or size % GRANULARITY or alignment & (alignment - 1) or address or flags:
            raise _Refused("INVALID_VALUE")
        # An odd multiple of what was asked for: nothing is aligned further than that by luck.
        unit = max(alignment, GRANULARITY)
        address = (-(-self._next_address // unit) | 1) * unit
        self._next_address = address + size
        self.reserved[rank, address] = size
        return address

    def _cuMemAddressFree(self, rank, address, size):
        if ("cuMemUnmap", rank, address, size) in self._failed:
            raise _Refused("INVALID_VALUE")
        if (rank, address) in self.mapped:
            self._violate(f"{address:#x} is freed while mapped")
        if self.reserved.pop((rank, address), None) != size:
            self._violate(f"{address:#x} is freed but not reserved with this size")

    def _cuMemMap(self, rank, address, size, offset, handle, flags):
        thing = self._thing(rank, handle)
        if self.reserved.get((rank, address)) != size:
            self._violate(f"{address:#x} is mapped but not reserved with this size")
        granularity = thing.granularity
        if address % granularity or size % granularity or size != thing.size or offset or flags:
            raise _Refused("INVALID_VALUE")
        if isinstance(thing, Multicast):
            self._world.wait(lambda: thing.is_complete, "cuMemMap of a multicast object")
        if ("cuMemUnmap", rank, address, size) in self._failed:
            raise _Refused("INVALID_VALUE")
        if (rank, address) in self.mapped:
            self._violate(f"{address:#x} is mapped twice")
        self.mapped[rank, address] = Mapping(thing, size)

    def _cuMemSetAccess(self, rank, address, size, accesses, count):
        [access] = accesses
        mapping = self._mapping(rank, address, size)
        gpu = self._gpu(rank, access.location.id)
        if isinstance(mapping.thing, Memory) and not self._reaches(gpu, mapping.thing.gpu):
            raise _Refused("PEER_ACCESS_UNSUPPORTED")
        mapping.accessible = True

    def _cuMemUnmap(self, rank, address, size):
        self._mapping(rank, address, size)
        del self.mapped[rank, address]

    def _mapping(self, rank, address, size):
        mapping = self.mapped.get((rank, address))
        if mapping is None or mapping.size != size:
            self._violate(f"{address:#x} is not mapped with this size")
        return mapping

    def _cuMemsetD8(self, rank, address, value, size):
        mapping = self._mapping(rank, address, size)
        if isinstance(mapping.thing, Multicast) or not mapping.accessible:
            self._violate(f"a plain write to {address:#x}, which takes none")
        if not self.current[rank]:
            raise _Refused("INVALID_CONTEXT")
        mapping.thing.is_zeroed = value == 0

    # Multicast.

    def _cuMulticastGetGranularity(self, rank, properties, option):
        flags = real.CUmulticastGranularity_flags
        recommended = option == flags.CU_MULTICAST_GRANULARITY_RECOMMENDED
        return MULTICAST_RECOMMENDED if recommended else MULTICAST_MINIMUM

    def _cuMulticastCreate(self, rank, properties):
        size, handle_type = properties.size, real.CUmemAllocationHandleType(properties.handleTypes)
        if size <= 0 or size % MULTICAST_MINIMUM or properties.numDevices < 1 or properties.flags:
            raise _Refused("INVALID_VALUE")
        return self._handle(rank, Multicast(size, handle_type, properties.numDevices))

    def _cuMulticastAddDevice(self, rank, handle, ordinal):
        multicast, gpu = self._thing(rank, handle), self._gpu(rank, ordinal)
        if not self.gpus[gpu].has_multicast:
            raise _Refused("NOT_SUPPORTED")
        if gpu in multicast.gpus or multicast.is_complete:
            raise _Refused("INVALID_VALUE")
        multicast.gpus.add(gpu)

    def _cuMulticastBindMem(self, rank, handle, offset, memory_handle, memory_offset, size, flags):
        multicast, memory = self._thing(rank, handle), self._thing(rank, memory_handle)
        self._world.wait(lambda: multicast.is_complete, "cuMulticastBindMem")
        multiples = (offset, memory_offset, size)
        if flags or size <= 0 or any(each % MULTICAST_MINIMUM for each in multiples):
            raise _Refused("INVALID_VALUE")
        if offset + size > multicast.size or memory_offset + size > memory.size:
            raise _Refused("INVALID_VALUE")
        if memory.handle_type != multicast.handle_type or memory.gpu in multicast.bound:
            raise _Refused("INVALID_VALUE")
        if memory.gpu not in multicast.gpus:
            raise _Refused("INVALID_DEVICE")
        multicast.bound[memory.gpu] = memory

    def _cuMulticastUnbind(self, rank, handle, ordinal, offset, size):
        if self._thing(rank, handle).bound.pop(self._gpu(rank, ordinal), None) is None:
            self._violate("a GPU is unbound that is not bound")
