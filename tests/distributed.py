"""Run a function on several ranks, each a process, and fail loudly when one does."""

import io
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(function, world_size, *arguments, timeout_s=120):
    """Call `function(rank, *arguments)` on every rank of a gloo group; return results by rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank,
                args=(function, rank, world_size, str(Path(folder) / "store"), results, arguments),
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            answers = [results.get(timeout=timeout_s) for _ in ranks]
        finally:
            for process in ranks:
                process.join(5)
                if process.is_alive():
                    process.kill()
    failures = [f"rank {rank}:\n{value}" for rank, failed, value in answers if failed]
    assert not failures, "\n".join(failures)
    ordered = sorted(answers, key=lambda answer: answer[0])
    return [torch.load(io.BytesIO(value), weights_only=False) for _, _, value in ordered]


def _rank(function, rank, world_size, store, results, arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        # As bytes: a tensor would travel as shared memory that ends with this process.
        answer = io.BytesIO()
        torch.save(function(rank, *arguments), answer)
        results.put((rank, False, answer.getvalue()))
    except BaseException:  # noqa: BLE001 - the parent reports whatever it was
        results.put((rank, True, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        if dist.is_initialized():
            dist.destroy_process_group()
