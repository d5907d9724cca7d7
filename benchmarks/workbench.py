"""What the variants of one shape share on a rank: groups, buffers, the transport."""

import os
import textwrap
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks import switches
from benchmarks.cases import Case
from benchmarks.variant import Absent, Buffer, Inputs
from sglang_tokenweave.agreement import gather
from sglang_tokenweave.peer import MulticastTransport, PeerTransport
from sglang_tokenweave.transport import SymmetricBuffer, Transport

_REASON_CHARACTERS = 400

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A rank, its device, and the groups it is in."""

    rank: int
    world_size: int
    device: torch.device
    ranks_per_gpu: int = 1

    @property
    def group(self) -> dist.ProcessGroup:
        """Return the gloo group of all ranks."""
        group = dist.group.WORLD
        assert group is not None, "the harness has made it"
        return group

    @property
    def smoke(self) -> bool:
        """Return whether ranks share GPUs, so that times mean nothing."""
        return self.ranks_per_gpu > 1

    @cached_property
    def nccl(self) -> dist.ProcessGroup:
        """Return a NCCL group of all ranks, made on first use; a collective call."""
        if self.smoke:
            raise Absent("NCCL refuses ranks that share a GPU")
        switches.check("NCCL", False, os.environ)
        group: dist.ProcessGroup = dist.new_group(backend="nccl")
        return group

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def meet(self) -> None:
        """Wait for the device, then for all ranks; a collective call."""
        self.synchronize()
        dist.barrier(self.group)

    def left(self, end: float) -> float:
        """Return the seconds until `end`, on rank 0's clock; a collective call."""
        return gather(end - time.monotonic(), self.group)[0]

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; go on only if it succeeded on all of them.

        Raises:
            Absent: on all ranks; the text names the ranks and their errors, unless all agree.
        """
        result: Any = None
        problem = None
        try:
            result = action()
        except Absent as reason:
            problem = str(reason)
        except Exception as error:  # noqa: BLE001 - a rival's failure is a result, recorded by name
            # A compiler's log may be the text; the whole of it is in this process's output.
            traceback.print_exc()
            problem = textwrap.shorten(f"{type(error).__name__}: {error}", _REASON_CHARACTERS)
            self.synchronize()  # raises if the context is lost: that ends the run
        problems = gather(problem, self.group)
        if problem is not None and problems.count(problem) == len(problems):
            raise Absent(problem)
        found = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]
        if found:
            raise Absent("; ".join(found))
        done: T = result
        return done


class Workbench:
    """Buffers of one shape, made on first use; collective where they are symmetric."""

    def __init__(
        self, place: Place, hidden: int, dtype: torch.dtype, max_tokens: int, capacity: int
    ) -> None:
        """Prepare for calls of up to `max_tokens` rows, and `capacity` rows over all buffers."""
        self.place = place
        self.hidden = hidden
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.capacity = capacity
        self.inputs = Inputs(place.world_size, hidden, dtype, place.device)
        self.weight = self.inputs.weight()
        self._stack = ExitStack()

    def on_close(self, release: Callable[[], None]) -> None:
        """Call `release` when all ranks have finished with this shape, the last one first."""
        self._stack.callback(release)

    def close(self) -> None:
        """Release everything; a collective call."""
        self.place.meet()
        self._stack.close()

    def empty(self) -> torch.Tensor:
        """Return `[capacity, hidden]` of device memory."""
        return torch.empty(self.capacity, self.hidden, dtype=self.dtype, device=self.place.device)

    @cached_property
    def x(self) -> torch.Tensor:
        """Return ordinary device memory for partial sums."""
        return self.empty()

    @cached_property
    def residual(self) -> torch.Tensor:
        """Return ordinary device memory for residuals."""
        return self.empty()

    @cached_property
    def symmetric_x(self) -> torch.Tensor:
        """Return torch's symmetric memory for partial sums; a collective call."""
        if self.place.smoke:
            raise Absent("torch's symmetric memory refuses ranks that share a GPU")
        switches.check("torch's symmetric memory", False, os.environ)
        import torch.distributed._symmetric_memory as symmetric_memory

        memory: torch.Tensor = symmetric_memory.empty(
            (self.capacity, self.hidden), dtype=self.dtype, device=self.place.device
        )
        handle = symmetric_memory.rendezvous(memory, self.place.group)
        switches.check("torch's symmetric memory", bool(handle.multicast_ptr), os.environ)
        return memory

    @cached_property
    def transport(self) -> tuple[Transport, SymmetricBuffer]:
        """Return our unicast transport with its buffer; a collective call."""
        return self._allocate(PeerTransport(self.place.group, self.place.device))

    @cached_property
    def multicast_transport(self) -> tuple[Transport, SymmetricBuffer]:
        """Return our multicast transport with its buffer; a collective call."""
        switches.check("our multicast transport", True, os.environ)
        return self._allocate(MulticastTransport(self.place.group, self.place.device))

    def _allocate(self, transport: Transport) -> tuple[Transport, SymmetricBuffer]:
        self.on_close(transport.close)
        return transport, transport.allocate(self.capacity, self.hidden, self.dtype)

    def split(self, x: torch.Tensor, case: Case, count: int, *, norm: bool) -> list[Buffer]:
        """Cut `x`, and the residual if the variant norms, into `count` buffers."""
        cuts = [slice(i * case.tokens, (i + 1) * case.tokens) for i in range(count)]
        return [Buffer(x[cut], self.residual[cut] if norm else None) for cut in cuts]
