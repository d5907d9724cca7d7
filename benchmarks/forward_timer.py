"""A plugin of SGLang that times each forward pass, and what else a timed server needs.

`folder` writes what makes SGLang load it; `SETTINGS` in the server's environment says what it does.
"""

import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "tokenweave_forward_timer"
SETTINGS = "TOKENWEAVE_FORWARD_TIMER"
_ROOT = Path(__file__).resolve().parent.parent
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner."


@dataclass(frozen=True)
class Settings:
    """What the plugin does in a server's workers."""

    output: str = ""  # folder of a file of times for each rank; empty: nothing is timed
    no_communication: bool = False  # the layers' sums are left out: the results are wrong
    emulated_ranks: int = 0  # ours on one GPU: so many ranks' kernels, 0 for none
    draws_weights: bool = True


@dataclass(frozen=True)
class Pass:
    """One forward pass on one rank."""

    mode: str  # of SGLang's ForwardMode
    tokens: int
    wall_us: float  # until the device is done
    cpu_us: float  # until the call returns
    began_us: float = 0.0  # on a clock that the ranks of a machine share


def together(ranks: Sequence[Pass]) -> tuple[float, float]:
    """Return the microseconds of one pass on all ranks, and those of the slowest one's CPU part.

    From when the last rank has begun: until then the others wait for SGLang's scheduler, which
    hands each request on from the first rank, and not for what runs the batch.
    """
    begun_us = max(each.began_us for each in ranks)
    done_us = max(each.began_us + each.wall_us for each in ranks)
    return done_us - begun_us, max(each.cpu_us for each in ranks)


def folder(parent: Path, name: str = NAME, entry: str = f"{__name__}:register") -> Path:
    """Write the metadata of an installed plugin of SGLang, for PYTHONPATH; by default this one's.

    Args:
        parent: where to.
        entry: "module:function", called in each process of a server.
    """
    metadata = parent / f"{name}-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {entry}\n")
    return parent


def environment(settings: Settings, parent: Path, *others: str) -> dict[str, str]:
    """Return what to add to a server's environment: it loads this plugin, and others by name.

    Args:
        parent: as of `folder`.
    """
    paths = [str(parent), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        SETTINGS: json.dumps(asdict(settings)),
        "PYTHONPATH": os.pathsep.join(paths),
        "SGLANG_PLUGINS": ",".join((*others, NAME)),
    }


def read(output: Path, rank: int, offset: int) -> tuple[list[Pass], int]:
    """Return a rank's passes from a place in its file on, and the place behind them."""
    path = output / f"rank{rank}.jsonl"
    if not path.exists():
        return [], offset
    with path.open() as file:
        file.seek(offset)
        passes = [Pass(**json.loads(line)) for line in file]
        return passes, file.tell()


def register() -> None:
    """Register with SGLang."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_tokenweave import seams

    settings = Settings(**json.loads(os.environ[SETTINGS]))

    def timed(original: Any, runner: Any, batch: Any, *arguments: Any, **named: Any) -> Any:
        import torch

        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        synchronize()
        begin = time.perf_counter()
        result = original(runner, batch, *arguments, **named)
        returned = time.perf_counter()
        synchronize()
        end = time.perf_counter()
        found = Pass(
            batch.forward_mode.name,
            batch.input_ids.shape[0],
            1e6 * (end - begin),
            1e6 * (returned - begin),
            1e6 * begin,  # Linux counts from the machine's start, for every process
        )
        rank = seams.tensor_parallel_group().rank_in_group
        with open(f"{settings.output}/rank{rank}.jsonl", "a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        return result

    if settings.output:
        HookRegistry.register(_RUNNER + "forward", timed, HookType.AROUND)
    if settings.draws_weights:
        HookRegistry.register(_RUNNER + "load_model", _after_load_model, HookType.AFTER)
    if settings.no_communication:
        HookRegistry.register(_RUNNER + "load_model", _leave_out_sums, HookType.AFTER)
    if settings.emulated_ranks:
        emulate(settings.emulated_ranks)


def _after_load_model(result: None, runner: Any) -> None:
    """Draw the weights: SGLang's dummies are so small that GEMMs take less power than real ones."""
    import torch

    for name, parameter in runner.model.named_parameters():
        if not parameter.is_floating_point():
            continue
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        if parameter.dim() == 1:
            parameter.data.normal_(1.0, 0.1, generator=generator)
        else:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def _leave_out_sums(result: None, runner: Any) -> None:
    """Leave out the sums of the layers, and keep the embedding's.

    A rank embeds its share of the vocabulary. Unsummed, the rows of all other tokens would be zero,
    become alike in the first layer and stay so, and take less power to multiply than real ones:
    under load the GEMMs would be faster than with any communication that is hidden.
    """
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers import vocab_parallel_embedding as embedding

    from sglang_tokenweave import seams

    def summed(rows: Any) -> Any:
        return all_reduce(seams.tensor_parallel_group(), rows)

    all_reduce = GroupCoordinator.all_reduce
    embedding.tensor_model_parallel_all_reduce = summed
    GroupCoordinator.all_reduce = lambda self, tensor: tensor


def emulate(num_ranks: int = 2) -> None:
    """Let a server on one GPU weave, with the kernels of so many ranks."""
    from sglang_tokenweave import refusals, transports
    from sglang_tokenweave.emulation import EmulatedTransport
    from sglang_tokenweave.transport import SymmetricBuffer, Transport

    find = refusals.find

    def find_other_reasons(*arguments: Any) -> tuple[str, ...]:
        return tuple(
            reason for reason in find(*arguments) if "tensor parallel size is 1" not in reason
        )

    def no_reasons(*arguments: Any) -> tuple[str, ...]:
        return ()

    def create(*arguments: Any, **options: Any) -> tuple[Transport, SymmetricBuffer]:
        transport = EmulatedTransport(num_ranks)
        _, _, _, *rows = arguments  # name, device, group
        return transport, transport.allocate(*rows)

    refusals.find = find_other_reasons  # type: ignore[assignment] # the same, for any arguments
    transports.reasons = no_reasons  # type: ignore[assignment] # likewise
    transports.create = create
