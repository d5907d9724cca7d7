"""A ForwardBatch without SGLang, for what cuts batches."""

from dataclasses import dataclass, field
from enum import Enum

import torch


class Mode(Enum):
    EXTEND = 1
    DECODE = 2

    def is_decode(self):
        return self is Mode.DECODE


@dataclass
class Batch:
    """The fields of SGLang's ForwardBatch that a split has to change, and two unknown ones."""

    forward_mode: Mode
    batch_size: int
    input_ids: torch.Tensor
    positions: torch.Tensor
    out_cache_loc: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    seq_lens_sum: int
    extend_seq_lens: torch.Tensor | None = None
    extend_seq_lens_cpu: list | None = None
    extend_prefix_lens: torch.Tensor | None = None
    extend_prefix_lens_cpu: list | None = None
    extend_start_loc: torch.Tensor | None = None
    extend_num_tokens: int | None = None
    num_token_non_padded: torch.Tensor | None = None
    forward_metadata_ready: bool = False
    sampling_info: object = None
    mm_inputs: list | None = None
    rids: list = field(default_factory=list)
    surprise: object = None
    unknown_flag: bool = False


def make_batch(lengths, prefixes, decode=False):
    total = sum(lengths)
    sequence = torch.tensor([p + n for p, n in zip(prefixes, lengths, strict=True)])
    batch = Batch(
        forward_mode=Mode.DECODE if decode else Mode.EXTEND,
        batch_size=len(lengths),
        input_ids=torch.arange(1000, 1000 + total),
        positions=torch.cat(
            [torch.arange(p, p + n) for p, n in zip(prefixes, lengths, strict=True)]
        ),
        out_cache_loc=torch.arange(5000, 5000 + total),
        req_pool_indices=torch.arange(len(lengths)) + 7,
        seq_lens=sequence,
        seq_lens_cpu=sequence.clone(),
        seq_lens_sum=int(sequence.sum()),
        num_token_non_padded=torch.tensor(total, dtype=torch.int32),
        forward_metadata_ready=True,
        sampling_info=object(),
        rids=[f"request-{index}" for index in range(len(lengths))],
    )
    if not decode:
        batch.extend_seq_lens = torch.tensor(lengths, dtype=torch.int32)
        batch.extend_seq_lens_cpu = list(lengths)
        batch.extend_prefix_lens = torch.tensor(prefixes, dtype=torch.int32)
        batch.extend_prefix_lens_cpu = list(prefixes)
        batch.extend_start_loc = batch.extend_seq_lens.cumsum(0) - batch.extend_seq_lens
        batch.extend_num_tokens = total
    return batch
