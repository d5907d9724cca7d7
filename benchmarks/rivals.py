"""The other ways to do the op, each through its own API and called as its users call it."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import switches
from benchmarks.cases import Case
from benchmarks.variant import EPS, Absent, Buffer, Output, Variant
from benchmarks.workbench import Workbench
from sglang_tokenweave.oneshot import OneShot, Workspace

_MIB = 2**20
# A workspace for so many bytes of activations made flashinfer 0.6.15 touch memory that is not
# mapped; one for 448 MiB did not.
_FLASHINFER_BYTES = 512 * _MIB
_ONE_SHOT_TOKENS = 2048  # for small batches; a workspace takes 8 times their bytes per rank
_RAISED_BYTES = 128 * _MIB  # as far as SGLang's table for its all-reduce goes on Hopper


class _AllReduceThenNorm(Variant):
    """An all-reduce, and flashinfer's fused add and norm after it if the name says so."""

    def __init__(self, bench: Workbench, name: str) -> None:
        self.name = name
        self.bench = bench
        self.with_norm = name.endswith("+norm")
        # Ring or tree: each addition rounds; then the residual's and the output.
        self.roundings = bench.place.world_size - 1 + (2 if self.with_norm else 0)
        self._norm = _fused_add_rmsnorm() if self.with_norm else None

    def buffers(self, case: Case, count: int) -> list[Buffer]:
        return self.bench.split(self.x(), case, count, norm=self.with_norm)

    def x(self) -> torch.Tensor:
        return self.bench.x

    def run(self, buffer: Buffer) -> Output:
        total = self.all_reduce(buffer.x)
        if self._norm is not None:
            self._norm(total, buffer.residual, self.bench.weight, EPS)
        return Output(total, buffer.residual)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks, in place or not."""
        raise NotImplementedError


class Nccl(_AllReduceThenNorm):
    """NCCL, in place."""

    def __init__(self, bench: Workbench, name: str) -> None:
        super().__init__(bench, name)
        self._group = bench.place.nccl

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self._group)
        return x


class TorchSymmetric(_AllReduceThenNorm):
    """torch's symmetric memory over unicast, the GEMM's output taken to be in it already."""

    def __init__(self, bench: Workbench, name: str) -> None:
        super().__init__(bench, name)
        if bench.dtype is not torch.bfloat16:
            raise Absent("torch's symmetric-memory all-reduce takes bf16 and float32 only")
        self._x = bench.symmetric_x
        self._group_name = bench.place.group.group_name
        self._one_shot = name.startswith("one_shot")

    def x(self) -> torch.Tensor:
        return self._x

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.symm_mem
        if self._one_shot:
            total: torch.Tensor = ops.one_shot_all_reduce(x, "sum", self._group_name)
            return total
        ops.two_shot_all_reduce_(x, "sum", self._group_name)
        return x


class SGLangV2(_AllReduceThenNorm):
    """SGLang's CustomAllReduceV2, at its default size limit (16 MiB) or a raised one."""

    def __init__(self, bench: Workbench, name: str) -> None:
        super().__init__(bench, name)
        if bench.place.smoke:
            raise Absent("torch's symmetric memory, which it uses, refuses ranks that share a GPU")
        switches.check("SGLang's CustomAllReduceV2", False, os.environ)
        # Its own check asks SGLang's groups, which only a server has. That peers reach each other
        # was seen when the link's floor was set up.
        os.environ["SGLANG_SKIP_P2P_CHECK"] = "1"
        from sglang.srt.distributed.device_communicators.custom_all_reduce_v2 import (
            CustomAllReduceV2,
        )

        limit = {"max_size": _RAISED_BYTES} if "_raised" in name else {}
        self._all_reduce = CustomAllReduceV2(bench.place.group, bench.place.device, **limit)
        if self._all_reduce.disabled:
            raise Absent("SGLang's CustomAllReduceV2 switched itself off; its log says why")
        uses_multicast = bool(self._all_reduce.mc_base_ptr)
        switches.check("SGLang's CustomAllReduceV2", uses_multicast, os.environ)

    def refuses(self, case: Case) -> str | None:
        config = self._all_reduce.config  # checked eagerly, timed in a graph
        limit = min(config.graph.max_pull_bytes, config.eager.max_pull_bytes)
        return None if case.bytes <= limit else f"above its limit of {limit} bytes"

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self._all_reduce.custom_all_reduce(x)
        return total

    def capturing(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._all_reduce.capture()
        return context

    def close(self) -> None:
        self._all_reduce.close()


class Flashinfer(Variant):
    """flashinfer's fused all-reduce with its own choice of one- or two-shot, as SGLang calls it."""

    name = "flashinfer"

    def __init__(self, bench: Workbench, name: str) -> None:
        self.bench = bench
        self.roundings = bench.place.world_size + 1
        switches.check("flashinfer's trtllm all-reduce", False, os.environ)
        row_bytes = bench.hidden * bench.dtype.itemsize
        self._max_tokens = min(bench.max_tokens, (_FLASHINFER_BYTES - 1) // row_bytes)
        self._workspace = Workspace(
            bench.place.group,
            max_tokens=self._max_tokens,
            hidden_size=bench.hidden,
            dtype=bench.dtype,
        )
        comm = self._workspace.comm
        self._fusion = comm.allreduce_fusion
        self._pattern = comm.AllReduceFusionPattern.kARResidualRMSNorm

    def refuses(self, case: Case) -> str | None:
        most = self._max_tokens
        return None if case.tokens <= most else f"above its workspace of {most} tokens"

    def buffers(self, case: Case, count: int) -> list[Buffer]:
        return self.bench.split(self.bench.x, case, count, norm=True)

    def run(self, buffer: Buffer) -> Output:
        output = torch.empty_like(buffer.x)
        total = torch.empty_like(buffer.x)
        self._fusion(
            input=buffer.x,
            workspace=self._workspace.handle,
            pattern=self._pattern,
            launch_with_pdl=True,
            trigger_completion_at_end=False,
            residual_in=buffer.residual,
            residual_out=total,
            norm_out=output,
            rms_gamma=self.bench.weight,
            rms_eps=EPS,
        )
        return Output(output, total)

    def close(self) -> None:
        self._workspace.close()


class FlashinferOneShot(Variant):
    """Our wrapper around the same kernel, always one-shot, summing in float32, launched late."""

    name = "flashinfer/oneshot"
    roundings = 3  # sum, residual, output

    def __init__(self, bench: Workbench, name: str) -> None:
        self.bench = bench
        switches.check("flashinfer's trtllm all-reduce", False, os.environ)
        place = bench.place
        self._op = OneShot(
            place.group,
            max_tokens=min(bench.max_tokens, _ONE_SHOT_TOKENS),
            hidden_size=bench.hidden,
            dtype=bench.dtype,
        )

    def refuses(self, case: Case) -> str | None:
        most = self._op.max_tokens
        return None if case.tokens <= most else f"above its workspace of {most} tokens"

    def buffers(self, case: Case, count: int) -> list[Buffer]:
        return self.bench.split(self.bench.x, case, count, norm=True)

    def run(self, buffer: Buffer) -> Output:
        assert buffer.residual is not None
        return Output(
            *self._op.allreduce_rmsnorm(buffer.x, buffer.residual, self.bench.weight, EPS)
        )

    def close(self) -> None:
        self._op.close()


def _fused_add_rmsnorm() -> Callable[..., None]:
    try:
        from flashinfer.norm import fused_add_rmsnorm
    except ImportError as error:
        raise Absent(f"its norm is flashinfer's, which does not import: {error}") from error
    norm: Callable[..., None] = fused_add_rmsnorm
    return norm


RIVALS: dict[str, Callable[[Workbench, str], Variant]] = {
    "nccl": Nccl,
    "nccl+norm": Nccl,
    "two_shot": TorchSymmetric,
    "two_shot+norm": TorchSymmetric,
    "one_shot+norm": TorchSymmetric,
    "sglang_v2+norm": SGLangV2,
    "sglang_v2_raised+norm": SGLangV2,
    "flashinfer": Flashinfer,
    "flashinfer/oneshot": FlashinferOneShot,
}
