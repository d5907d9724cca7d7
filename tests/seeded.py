"""SGLang's sampling by seeds on the tests' servers, and what it may choose, told from outside.

A request's `sampling_seed` counts in SGLang only with --enable-deterministic-inference, with which
no batch is woven, and its hash is compiled code that the CPU path lacks. `pythonpath` switches the
seeded sampler on without that mode, and gives it the hash in torch.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from server import after_import

# A request's tokens depend on the others in its batch unless it has a `top_k`: without any in the
# batch, SGLang numbers the tokens by their ids, and else by rank. This many are known by rank.
MOST_RANKS = 15
_NUM_TRIALS = 256
_SEEDS_ON = """
import types
import torch
from sglang.srt.sampling import sampling_batch_info as _info

_get_exec = _info.get_exec
_info.get_exec = lambda: types.SimpleNamespace(
    features=_get_exec().features,
    deterministic=types.SimpleNamespace(enable_deterministic_inference=True),
)
"""


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return MurmurHash3 of (seed, position, column), `[rows, columns]`: SGLang's kernel's."""
    mask = 0xFFFFFFFF

    def rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
        return ((x << bits) | (x >> (32 - bits))) & mask

    seed = seed.view(torch.int64)[:, None]
    words = (seed & mask, (seed >> 32) & mask, positions.to(torch.int64)[:, None], columns[None])
    mixed = torch.zeros_like(seed)
    for word in words:
        word = rotate((word * 0xCC9E2D51) & mask, 15) * 0x1B873593 & mask
        mixed = (rotate(mixed ^ word, 13) * 5 + 0xE6546B64) & mask
    mixed = mixed ^ 16  # the bytes of a key
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
    return mixed


def pythonpath(folder: Path) -> list[Path]:
    """Return what a server needs on PYTHONPATH to sample by seeds."""
    code = _SEEDS_ON + inspect.getsource(murmur_hash32)
    return [after_import(folder, "sglang.srt.layers.sampler", code)]


def choices(
    best: Sequence[tuple[float, int]],
    sampling: Mapping[str, Any],
    position: int,
    error: float = 0.0,
) -> set[int]:
    """Return the tokens that the sampler may choose if log probabilities are off by `error`.

    Args:
        best: (log probability, token), the best first; more than `top_k` has.
        sampling: of the request: temperature, and with one above 0 sampling_seed, top_k, top_p.
        position: of the last token before, from 0.
    """
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.tensor([logprob for logprob, _ in best], dtype=torch.float64)
    noise = torch.rand(_NUM_TRIALS, len(best), generator=generator, dtype=torch.float64)
    noise[0] = 0.5  # one without error
    logprobs, order = (logprobs + error * (2 * noise - 1)).sort(dim=1, descending=True)
    if sampling["temperature"] == 0:
        chosen = torch.zeros(_NUM_TRIALS, 1, dtype=torch.int64)
    else:
        chosen = _sample(logprobs, sampling, position)
    ranks = order.gather(1, chosen)[:, 0].unique()
    return {best[rank][1] for rank in ranks.tolist()}


def _sample(logprobs: torch.Tensor, sampling: Mapping[str, Any], position: int) -> torch.Tensor:
    """Return the column chosen in each row of sorted log probabilities, by Gumbel's noise."""
    columns = torch.arange(logprobs.shape[1])
    before = logprobs.exp().cumsum(1) - logprobs.exp()
    is_out = (columns >= sampling["top_k"]) | (before > sampling.get("top_p", 1.0))
    hashed = murmur_hash32(
        torch.tensor([sampling["sampling_seed"]]), torch.tensor([position]), columns
    )
    uniform = hashed.to(torch.float64) / (2**32 - 1)
    gumbel = -(-uniform.log().clamp(max=-(2.0**-32))).log()
    return (logprobs + gumbel).masked_fill(is_out, -torch.inf).argmax(1, keepdim=True)
