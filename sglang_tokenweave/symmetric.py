"""Memory that every rank of a tensor-parallel group can reach: allocations mapped by all."""

import logging
import math
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist

from sglang_tokenweave import deadlines, devices, driver, multicast, sharing, virtual_memory
from sglang_tokenweave.agreement import DisagreementError, Group, LostRankError, as_group, step
from sglang_tokenweave.loading import ordinal
from sglang_tokenweave.sharing import Member
from sglang_tokenweave.virtual_memory import round_up

logger = logging.getLogger(__name__)


class PeerMemory:
    """One allocation per rank, of equal size, mapped by all ranks.

    `addresses[r]` is where this process reaches rank r's memory; `bytes` is its own as a tensor.
    `multicast_address`, if not None, is where `multimem` instructions, and only they, reach the
    memory of all ranks at once; if None, `why_no_multicast` is the reason, alike on all ranks.
    """

    def __init__(
        self,
        num_bytes: int,
        device: torch.device,
        group: dist.ProcessGroup | Group,
        *,
        use_multicast: bool = False,
        across_hosts: bool = False,
    ) -> None:
        """Allocate at least `num_bytes`, zeroed; a collective call over `group`, on the CPU.

        Args:
            use_multicast: attach the memory to a multicast object, too, where all ranks can.
            across_hosts: share by FABRIC handles where all ranks can; else by descriptors, which
                only reach the ranks of one host.

        Raises:
            DisagreementError: on all ranks, when any rank failed; nothing stays allocated.
            LostRankError: some rank did not take part in time; nothing stays allocated.
        """
        if num_bytes < 1:
            raise ValueError(f"num_bytes is {num_bytes}; it must be at least 1")
        self._device = torch.device("cuda", ordinal(device))
        self._group = as_group(group, deadlines.SHARING_S)
        self.rank = self._group.rank
        self.addresses: list[int] = []
        self.multicast_address: int | None = None
        self.why_no_multicast: str | None = "it was not asked for"
        # What is temporary, handles and descriptors, lives on in the mappings.
        with ExitStack() as owned, ExitStack() as temporary:
            self._check_arguments((num_bytes, use_multicast, across_hosts))
            self._context = step("the context", self._group, partial(self._enter, owned, temporary))
            member = sharing.join(self._group, self._device.index, across_hosts=across_hosts)
            alignment = self._agree_on_alignment(member, num_bytes, use_multicast=use_multicast)
            self._size = round_up(num_bytes, alignment)
            memory = self._map_everyone(member, alignment, owned, temporary)
            if self.why_no_multicast is None:
                self._attach(member, memory, alignment, owned)
            if use_multicast and self.rank == 0 and self.why_no_multicast is not None:
                logger.warning("no multicast: %s", self.why_no_multicast)
            self._owned = owned.pop_all()

    @cached_property
    def bytes(self) -> torch.Tensor:
        """Return this rank's memory as a uint8 tensor; it must not be used after `close`."""
        return _as_tensor(self.addresses[self.rank], self._size, self._device)

    def close(self) -> None:
        """Release everything; all ranks must have finished using the memory.

        With multicast a collective call: all ranks stop before the first one takes its memory
        away. What fails is logged and not raised, and nothing is done once CUDA itself is gone.
        """
        self.addresses = []
        self.multicast_address, had_multicast = None, self.multicast_address is not None
        self.__dict__.pop("bytes", None)
        owned = self._owned.pop_all()
        if not devices.is_context_alive(self._device.index):
            owned.pop_all()  # the driver has released all of it with the context
            return
        try:
            with devices.current(self._context):
                driver.call("cuCtxSynchronize")
        except driver.CudaError as error:
            logger.warning("releasing memory that may be in use: %s", error)
        try:
            if had_multicast:
                self._group.gather(None)
        except LostRankError as error:
            logger.warning("releasing memory without waiting for all ranks: %s", error)
        owned.close()

    def _check_arguments(self, arguments: tuple[int, bool, bool]) -> None:
        asked = self._group.gather(arguments)
        if len(set(asked)) > 1:
            raise DisagreementError(
                f"the ranks ask for different (num_bytes, use_multicast, across_hosts): {asked}"
            )

    def _enter(self, owned: ExitStack, temporary: ExitStack) -> Any:
        is_initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call] # torch's gap
        if is_initialized and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph is being captured; allocate before the capture")
        context = devices.retain_context(self._device.index, owned)
        temporary.enter_context(devices.current(context))
        return context

    def _agree_on_alignment(self, member: Member, num_bytes: int, *, use_multicast: bool) -> int:
        """Return a multiple for sizes and addresses that suits all ranks, and multicast if used."""
        query = partial(virtual_memory.granularity, member.device_index, member.handle_type)
        alignment = step("cuMemGetAllocationGranularity", member.group, query)
        if use_multicast:
            size = round_up(num_bytes, alignment)
            try:
                query = partial(multicast.granularity, member, size)
                alignment = math.lcm(alignment, step("multicast", member.group, query))
                self.why_no_multicast = None
            except DisagreementError as error:
                self.why_no_multicast = str(error)
        return math.lcm(*member.group.gather(alignment))

    def _map_everyone(
        self, member: Member, alignment: int, owned: ExitStack, temporary: ExitStack
    ) -> Any:
        """Allocate, share, map and zero; return the handle of this rank's memory."""
        group, size, device_index = member.group, self._size, member.device_index
        allocate = partial(virtual_memory.create, size, device_index, member.handle_type, temporary)
        own = step("cuMemCreate", group, allocate)
        export = partial(virtual_memory.export, own, member.handle_type, temporary)
        received = sharing.share(member, step("exporting memory", group, export), temporary)

        def map_all() -> None:
            for rank, exported in enumerate(received):
                handle = own
                if rank != self.rank:
                    handle = virtual_memory.import_handle(exported, member.handle_type, temporary)
                address = virtual_memory.reserve(size, alignment, owned)
                virtual_memory.map_at(address, handle, size, device_index, owned)
                self.addresses.append(address)

        def zero() -> None:
            driver.call("cuMemsetD8", self.addresses[self.rank], 0, size)
            driver.call("cuCtxSynchronize")

        step("mapping", group, map_all)
        step("zeroing", group, zero)  # nobody signals into memory that is not zeroed yet
        return own

    def _attach(self, member: Member, memory: Any, alignment: int, owned: ExitStack) -> None:
        try:
            self.multicast_address = multicast.attach(member, memory, self._size, alignment, owned)
        except DisagreementError as error:
            self.why_no_multicast = str(error)


def _as_tensor(address: int, size: int, device: torch.device) -> torch.Tensor:
    """Return the memory as a uint8 tensor, without a copy."""

    class Memory:
        __cuda_array_interface__ = {  # noqa: RUF012 - the protocol asks for a plain attribute
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    return torch.as_tensor(Memory(), device=device)
