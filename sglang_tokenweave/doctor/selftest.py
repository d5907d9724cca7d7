"""Run the communication op on this machine's GPUs and say whether it is right, and how fast."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_tokenweave.doctor.facts import Facts
from sglang_tokenweave.doctor.findings import Finding, finding
from sglang_tokenweave.doctor.forms import FORMS, Form, multicast_switches
from sglang_tokenweave.doctor.hardware import NUM_RANKS

if TYPE_CHECKING:
    from sglang_tokenweave.doctor.selftest_rank import Outcome, Timings

DEADLINE_S = 240.0  # start, compile, run
HIDDEN_SIZE = 8192  # of Llama 70B
SLOW = 0.5  # of the link's speed at the largest size
# Whatever else is wrong, the op can be tried.
_BLOCKING = frozenset(
    {
        "no-gpu",
        "gpus-not-visible",
        "gpu-unsupported",
        "gpu-cannot-share",
        "mig",
        "driver-not-ready",
        "driver-failed",
        "driver-too-old",
        "cuda-python-missing",
        "nvrtc-unusable",
        "no-peer-access",
        "exchange-failed",
        "torch-missing",
        "torch-without-cuda",
    }
)


@dataclass(frozen=True)
class Result:
    """What the self-test found; `measured` has one line for each size, GB/s and share of link."""

    transport: str
    passed: bool
    findings: tuple[Finding, ...]
    measured: tuple[dict[str, float], ...] = ()


def refuse_multicast() -> Result | None:
    """Return why the multicast self-test may not run; nothing of CUDA has been touched then."""
    switches = multicast_switches()
    if switches:
        text = f"multicast is switched off by {' and '.join(switches)}: it is not touched"
        return Result("multicast", False, (finding("selftest-refused", text),))
    return None


def run(transport: str, facts: Facts, findings: Sequence[Finding]) -> Result:
    """Run the self-test of a transport on as many of these GPUs as it serves."""
    blocking = [found for found in findings if found.id in _BLOCKING]
    if blocking:
        text = f"the op was not run: {'; '.join(found.text for found in blocking)}"
        return Result(transport, False, (finding("selftest-not-run", text),))
    num_gpus = len(facts.gpus)
    if num_gpus == 1:
        devices = ["cuda:0", "cuda:0"]  # two processes share it
    else:
        num_ranks = max(ranks for ranks in NUM_RANKS if ranks <= num_gpus)
        devices = [f"cuda:{rank}" for rank in range(num_ranks)]
    return run_op(FORMS[transport], transport, devices)


def run_op(
    form: Form, transport: str, devices: Sequence[str], hidden_size: int = HIDDEN_SIZE
) -> Result:
    """Run the op with one rank per entry of `devices`, and judge what the ranks report."""
    from sglang_tokenweave.doctor.ranks import RankError, run_ranks

    is_timed = len(set(devices)) > 1
    try:
        what = (form.make, tuple(devices), hidden_size, is_timed)
        reports = run_ranks(_on_rank, len(devices), *what, deadline_s=DEADLINE_S)
    except RankError as error:
        return Result(transport, False, (finding("selftest-failed", str(error)),))
    wrong = list(_wrong([outcomes for outcomes, _ in reports]))
    if wrong:
        text = f"{transport} on {len(devices)} ranks: {'; '.join(wrong)}"
        return Result(transport, False, (finding("selftest-wrong", text),))
    return _passed(form, transport, devices, hidden_size, reports)


def _on_rank(
    rank: int, group: Any, make: Any, devices: tuple[str, ...], hidden_size: int, is_timed: bool
) -> tuple[tuple["Outcome", ...], "Timings | None"]:
    import torch

    from sglang_tokenweave.doctor import selftest_rank

    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return selftest_rank.run(make, group, device, hidden_size, is_timed)


def _wrong(ranks: Sequence[Sequence["Outcome"]]) -> list[str]:
    from sglang_tokenweave.doctor.selftest_rank import TOLERANCE

    texts = []
    for outcomes in zip(*ranks, strict=True):
        name = f"{outcomes[0].case.num_tokens} tokens"
        worst = max(outcome.error for outcome in outcomes)
        if worst > TOLERANCE:
            texts.append(f"{name}: relative error {worst:.1e}, {TOLERANCE:.0e} is allowed")
        if not all(outcome.is_tidy for outcome in outcomes):
            texts.append(f"{name}: rows of another batch were overwritten")
        if len({outcome.digest for outcome in outcomes}) > 1:
            texts.append(f"{name}: the ranks hold different bits")
    return texts


def _passed(
    form: Form, transport: str, devices: Sequence[str], hidden_size: int, reports: Any
) -> Result:
    from sglang_tokenweave.doctor import selftest_rank as rank

    num = len(devices)
    worst = max(outcome.error for outcomes, _ in reports for outcome in outcomes)
    text = f"{transport} on {num} ranks: {len(rank.CASES)} cases, error {worst:.1e} against float64"
    timings = reports[0][1]
    if timings is None:
        note = f"{num} ranks shared {devices[0]}: correctness only, no link was measured"
        return Result(
            transport, True, (finding("selftest-passed", text), finding("selftest-one-gpu", note))
        )
    measured = tuple(_measured(form.traffic(num) * hidden_size, timings))
    speeds = ", ".join(
        f"{each['num_tokens']} tokens {each['gb_per_s']:.0f} GB/s ({each['share_of_link']:.0%})"
        for each in measured
    )
    text += f"; {speeds} of a link of {timings.link_gb_per_s:.0f} GB/s"
    found = [finding("selftest-passed", text)]
    if measured[-1]["share_of_link"] < SLOW:
        found.append(finding("selftest-slow", f"the op uses less than {SLOW:.0%} of the link"))
    return Result(transport, True, tuple(found), measured)


def _measured(sent: float, timings: "Timings") -> Iterator[dict[str, float]]:
    """Yield a line for each size; `sent`: elements that a GPU sends for a token."""
    from sglang_tokenweave.doctor.selftest_rank import DTYPE, TIMED_TOKENS

    for tokens, op_us in zip(TIMED_TOKENS, timings.op_us, strict=True):
        speed = sent * tokens * DTYPE.itemsize / op_us / 1e3
        yield {
            "num_tokens": tokens,
            "op_us": op_us,
            "gb_per_s": speed,
            "link_gb_per_s": timings.link_gb_per_s,
            "share_of_link": speed / timings.link_gb_per_s,
        }
