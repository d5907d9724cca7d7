"""The op for small batches, by flashinfer's fused one-shot all-reduce.

Every rank writes its partial sums to all others and each adds them up itself: one exchange instead
of two, for world_size - 1 times the bytes. Unlike the sharded op, it takes and returns the whole
residual, which every rank holds alike.
"""

from typing import Any

import torch
import torch.distributed as dist

from sglang_tokenweave.agreement import step
from sglang_tokenweave.operands import check_tensor

WORLD_SIZES = (2, 4, 8, 16)  # that flashinfer's kernel is built for
DTYPES = (torch.bfloat16, torch.float16)
_VECTOR_BYTES = 16  # of one of the kernel's accesses
# Offsets in flashinfer's exchange buffer are 32-bit; it rounds the limit down to 2 MiB.
_MAX_EXCHANGE_BYTES = (2**31 - 1) // 2**21 * 2**21


class FlashinferError(RuntimeError):
    """flashinfer is not installed, or could not make its workspace."""


def exchange_bytes(num_tokens: int, hidden_size: int, world_size: int, dtype: torch.dtype) -> int:
    """Return the bytes that a rank receives in one exchange, its own included."""
    return num_tokens * hidden_size * world_size * dtype.itemsize


def check_sizes(max_tokens: int, hidden_size: int, world_size: int, dtype: torch.dtype) -> None:
    """Refuse what flashinfer's kernel does not do.

    Raises:
        ValueError: naming what came and what is allowed.
    """
    if world_size not in WORLD_SIZES:
        raise ValueError(f"{world_size} ranks: flashinfer's kernel is built for {WORLD_SIZES}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: allowed are {', '.join(map(str, DTYPES))}")
    if hidden_size < 1 or hidden_size * dtype.itemsize % _VECTOR_BYTES:
        raise ValueError(
            f"hidden_size {hidden_size}: it must be a multiple of {_VECTOR_BYTES // dtype.itemsize}"
        )
    most = _MAX_EXCHANGE_BYTES // exchange_bytes(1, hidden_size, world_size, dtype)
    if not 1 <= max_tokens <= most:
        raise ValueError(
            f"max_tokens {max_tokens}: from 1 to {most} at hidden_size {hidden_size} on "
            f"{world_size} ranks, which is what flashinfer's exchange buffer can address"
        )


class Workspace:
    """flashinfer's memory for its fused all-reduce, over unicast."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """Allocate on the current CUDA device; a collective call over a CPU group of one host.

        Raises:
            DisagreementError: on all ranks, when flashinfer is missing or fails on any.
        """
        self.comm, backend = step("importing flashinfer", group, lambda: _flashinfer(group))
        options = {
            "backend": "trtllm",  # unicast; "auto" may choose "mnnvl", which is multicast
            "world_size": dist.get_world_size(group),
            "rank": dist.get_rank(group),
            "max_token_num": max_tokens,
            "hidden_dim": hidden_size,
            "dtype": dtype,
            "comm_backend": backend,
        }
        self.handle = step("flashinfer's workspace", group, lambda: _create(self.comm, options))

    def close(self) -> None:
        """Release the memory; all ranks must have finished using it."""
        # flashinfer keeps a reference of its own, which its `destroy` leaves.
        self.comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(self.handle.ipc_handles)
        self.handle.destroy()


class OneShot:
    """`allreduce_rmsnorm` on the whole residual, for up to `max_tokens` tokens."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """Allocate flashinfer's workspace on the current CUDA device; a collective call.

        The first use on a machine compiles flashinfer's kernels, which takes minutes.

        Args:
            group: a CPU group of one host.
            max_tokens: the most tokens of a call; the workspace takes about
                4 * world_size * max_tokens * hidden_size elements on each rank.
            hidden_size: of every call.
            dtype: of every call.

        Raises:
            ValueError: the kernel does not serve these sizes.
            DisagreementError: on all ranks, when flashinfer is missing or fails on any.
        """
        check_sizes(max_tokens, hidden_size, dist.get_world_size(group), dtype)
        self.max_tokens = max_tokens
        self.hidden_size = hidden_size
        self.dtype = dtype
        self._workspace = Workspace(
            group, max_tokens=max_tokens, hidden_size=hidden_size, dtype=dtype
        )

    def allreduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_offset: float = 0.0,
        early_launch: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return RMSNorm(total) * (weight_offset + weight), and the total itself.

        The total is the sum over ranks of x, in float32, rounded to the dtype, plus the residual.
        Enqueued on the current stream; capturable in a CUDA graph.

        Args:
            x: `[num_tokens, hidden_size]`, this rank's partial sums; left as it is.
            residual: `[num_tokens, hidden_size]`, alike on all ranks; left as it is.
            weight: `[hidden_size]`.
            eps: added to the mean of squares.
            weight_offset: 1.0 for norms that store their weight less one (Gemma).
            early_launch: start while the kernel before is ending (programmatic dependent launch).
                flashinfer's kernel reads residual and weight before it waits for that one, so
                whatever wrote them must have ended when that one began.

        Raises:
            ValueError: a tensor is not what the kernel takes, or has too many tokens.
        """
        self._check(x, residual, weight)
        output, total = torch.empty_like(x), torch.empty_like(residual)
        comm = self._workspace.comm
        comm.allreduce_fusion(
            input=x,
            workspace=self._workspace.handle,
            pattern=comm.AllReduceFusionPattern.kARResidualRMSNorm,
            launch_with_pdl=early_launch,
            trigger_completion_at_end=True,  # the next kernel need not know of this one
            residual_in=residual,
            residual_out=total,
            norm_out=output,
            rms_gamma=weight,
            rms_eps=eps,
            use_oneshot=True,
            fp32_acc=True,
            weight_bias=weight_offset,
        )
        return output, total

    def close(self) -> None:
        """Release the workspace; all ranks must have finished using it."""
        self._workspace.close()

    def _check(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        num_tokens = x.shape[0]
        if not 1 <= num_tokens <= self.max_tokens:
            raise ValueError(
                f"{num_tokens} tokens: the workspace is for 1 to {self.max_tokens}; "
                "larger batches are for the fused kernel"
            )
        rows = (num_tokens, self.hidden_size)
        check_tensor("x", x, rows, self.dtype, _VECTOR_BYTES)
        check_tensor("residual", residual, rows, self.dtype, _VECTOR_BYTES)
        check_tensor("weight", weight, (self.hidden_size,), self.dtype, _VECTOR_BYTES)


def _flashinfer(group: dist.ProcessGroup) -> tuple[Any, Any]:
    """Return flashinfer's communication module and its view of a CPU group."""
    try:
        from flashinfer import comm
        from flashinfer.comm.mnnvl import TorchDistBackend
    except ImportError as error:
        text = f"flashinfer is missing: pip install 'flashinfer-python>=0.6.15' ({error})"
        raise FlashinferError(text) from error
    return comm, TorchDistBackend(group=group)


def _create(comm: Any, options: dict[str, Any]) -> Any:
    try:
        return comm.create_allreduce_fusion_workspace(**options)
    except Exception as error:
        # Of any kind (it compiles, allocates, exchanges), and the other ranks wait to be told.
        raise FlashinferError(f"{type(error).__name__}: {error}") from error
