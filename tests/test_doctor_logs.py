"""What the doctor reads out of a server's log: each symptom, from texts as they were seen."""

import pytest

from sglang_tokenweave.descriptors import ExchangeError, exchange, new_token
from sglang_tokenweave.doctor import logs
from sglang_tokenweave.doctor.pains import PAINS, pains_of

WAIT = "tokenweave: rank {}, CTA {} waited 30000 ms for rank {}: epoch 7, seen 6"
STARTED = "[2026-01-01 00:00:00] server_args=ServerArgs(model_path='m', tp_size=2)"
COUNTS = "TokenWeave after 100 batches: prefill {} 100 (5000 tokens); cuts inside 0, between 0"

SEEN = [
    (
        "log-multicast-bind",
        "Failed to bind NVLink SHARP (NVLS) Multicast memory of size 2097152 : CUDA error 401",
    ),
    ("log-multicast-bind", "transport/nvls.cc:244 NCCL WARN Cuda failure 1 'invalid argument'"),
    ("log-multicast-bind", "cuMulticastBindMem: CUDA_ERROR_ILLEGAL_STATE (401)"),
    (
        "log-rank-failed",
        "sglang_tokenweave.agreement.DisagreementError: mapping failed on rank 1: "
        "cuMemMap: CUDA_ERROR_INVALID_VALUE (1)",
    ),
    ("log-rank-failed", "rank 0 of 2 does not reach all other ranks: did one end or stop"),
    (
        "log-fabric-starting",
        "cuMulticastBindMem: CUDA_ERROR_SYSTEM_NOT_READY (802); start the fabric manager",
    ),
    ("log-fabric-starting", "nvls.cc:223 NCCL WARN Cuda failure 802 'system not yet initialized'"),
    ("log-no-imex-channel", "cuMemCreate: CUDA_ERROR_NOT_PERMITTED (800); this container lacks"),
    ("log-no-imex-channel", "NvlinkTransport: cuMemCreate failed: 800"),
    ("log-no-imex-channel", "No such device channel"),
    ("log-ptrace", "RuntimeError: pidfd_getfd: Operation not permitted"),
    ("log-exchange", "the ranks run on several hosts, or in containers with networks of their own"),
    (
        "log-no-multicast",
        "TorchSymmMemCommunicator: torch symmetric memory multicast operations are not supported.",
    ),
    ("log-no-multicast", "cuMulticastCreate: CUDA_ERROR_NOT_SUPPORTED (801); the GPU"),
    ("log-multicast-off", "cuMulticastCreate is not called: NCCL_NVLS_ENABLE=0 forbids multicast"),
    ("log-multicast-off", "NCCL INFO NCCL_NVLS_ENABLE set by environment to 0."),
    ("log-no-peer-access", "Fatal Python error: Floating point exception"),
    ("log-no-peer-access", "Child process unexpectedly failed with an exit code -8. pid=12"),
    ("log-no-peer-access", "cuMemSetAccess: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED (217)"),
    (
        "log-rendezvous",
        "torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. "
        "4/8 clients joined.",
    ),
    ("log-pooled-memory", "server_args=ServerArgs(tokenweave, tp_size=2, enable_symm_mem=True)"),
    ("log-outside-buffer", "ValueError: rows 0:9000 are outside the buffer's 0:8192"),
    ("log-capture", "cuMemCreate: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (900)"),
    ("log-capture", "CUDA error: operation not permitted when stream is capturing"),
    ("log-nan", "NaN detected in sampler: next_token_logits; values were sanitized"),
    (
        "log-not-active",
        "TokenWeave is NOT active, LlamaForCausalLM runs stock: not supported with LoRA",
    ),
    (
        "log-hook-missing",
        "the hook on sglang.srt.managers.scheduler.Scheduler.run_batch did not take, needed to",
    ),
    ("log-compile", "kernels are compiled with NVRTC, but its library does not load: no such file"),
    ("log-out-of-memory", "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY (2); free GPU memory"),
    ("log-rank-late", WAIT.format(0, 0, 1) + "\n" + WAIT.format(0, 1, 1)),
    (
        "log-rank-late",
        "tokenweave: rank 0 (process 7), channel IN_LINE, op 5: a stream has waited 30 s for flags "
        "READY: rank 1's: expected 1, seen 0; those ranks hang",
    ),
    ("log-streams-crossed", WAIT.format(0, 0, 1) + "\n" + WAIT.format(1, 0, 0)),
    ("log-grids-differ", WAIT.format(0, 8, 1) + "\n" + WAIT.format(0, 9, 1)),
    ("log-silent", STARTED),
    ("log-never-woven", COUNTS.format("off")),
]


def ids(text):
    return [sighting.finding.id for sighting in logs.read(text.splitlines())]


@pytest.mark.parametrize(("name", "text"), SEEN, ids=lambda value: value[:24])
def test_each_symptom_is_recognised_alone(name, text):
    assert ids(text) == [name]


def test_every_symptom_is_tested():
    assert {name for name, _ in SEEN} | {"log-exchange"} == logs.CATALOGUE.keys()


@pytest.mark.parametrize(
    "text",
    [
        "",
        STARTED + "\nTokenWeave ACTIVE: LlamaForCausalLM, tp=2",
        COUNTS.format("weave"),
        "prefill batch, #new-seq: 1, #new-token: 802, #cached-token: 401",
        "exit code 0",
        "pid=-8",
    ],
)
def test_a_healthy_log_shows_nothing(text):
    assert ids(text) == []


def test_lines_are_counted_and_the_first_is_named():
    text = f"x\n{SEEN[0][1]}\ny\n{SEEN[0][1]}\n{WAIT.format(0, 0, 1)}"
    bind, late = logs.read(text.splitlines())
    assert (bind.line, bind.count) == (2, 2)
    assert (late.line, late.finding.id) == (5, "log-rank-late")
    assert "rank 0 for rank 1 (CTAs 0 to 0)" in late.finding.text
    assert SEEN[0][1] in bind.finding.text


def test_our_own_error_is_recognised():
    """Not a copy of the message: the message itself, so that the two cannot part."""
    with pytest.raises(ExchangeError) as error:
        exchange(0, 0, 2, new_token(), 0.05)
    assert ids(str(error.value)) == ["log-exchange"]


def test_the_kernel_s_message_is_recognised():
    from sglang_tokenweave.compiler import source_folder

    (message,) = [
        line
        for line in (source_folder() / "barrier.cuh").read_text().splitlines()
        if "waited" in line and "tokenweave" in line
    ]
    for form, value in (("%llu", "30000"), ("%u", "3")):
        message = message.replace(form, value)
    assert ids(message) == ["log-grids-differ"]  # CTA 3 alone


@pytest.mark.parametrize("number", PAINS)
def test_each_pain_is_recognised_in_a_log(number):
    """Also those that the machine shows: whoever has a log only must find them, too."""
    assert {name for name, _ in SEEN if number in pains_of(name)} or number == 6
    assert number != 6 or 6 in pains_of("log-exchange")
