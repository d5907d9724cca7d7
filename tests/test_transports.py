"""Which transport a server gets, and why not; creating one that multicast's switches forbid."""

from types import SimpleNamespace

import pytest
import torch
from distributed import run_ranks

from sglang_tokenweave import install, seams, transports
from sglang_tokenweave.agreement import DisagreementError
from sglang_tokenweave.config import TRANSPORTS, TokenWeaveConfig
from sglang_tokenweave.plan import Kind, Mode, PlanRow, PlanTable
from sglang_tokenweave.tuning import tuner
from sglang_tokenweave.tuning.measure import NotMeasurableError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))


def reasons(name, device=GPU, world_size=2, dtype=BF16, hidden_size=4096, norms=(BF16,)):
    name = transports.resolve(name, device, is_measured=False)
    return transports.reasons(name, device, world_size, dtype, hidden_size, norms)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_a_cpu_is_served_by_the_reference(name):
    for is_measured in (False, True):
        assert transports.resolve(name, CPU, is_measured=is_measured) == "reference"
    assert reasons(name, CPU, world_size=3, dtype=torch.float32) == ()


@pytest.mark.parametrize("name", ["peer", "multicast"])
def test_a_gpu_is_served_as_asked_and_a_cpu_is_told_why_not(name, hopper):
    assert reasons(name) == ()
    (reason,) = reasons(name, CPU)
    assert f"(transport) is '{name}'" in reason
    assert "use reference" in reason


def test_auto_on_a_gpu_says_what_else_there_is(hopper):
    (reason,) = reasons("auto")
    assert all(name in reason for name in TRANSPORTS if name != "auto")
    assert "leave thresholds and --tokenweave-tune away" in reason


def test_auto_on_a_gpu_is_peer_once_a_table_decides():
    assert transports.resolve("auto", GPU, is_measured=True) == "peer"
    assert transports.resolve("multicast", GPU, is_measured=True) == "multicast"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"world_size": 3}, "3 ranks"),
        ({"dtype": torch.float32, "norms": (torch.float32,)}, "dtype torch.float32"),
        ({"hidden_size": 4100}, "hidden_size 4100"),
        ({"norms": (BF16, torch.float32)}, "norms are torch.float32 and activations torch.bf"),
    ],
)
def test_what_the_kernel_does_not_serve_is_named(wrong, named, hopper):
    (reason,) = reasons("peer", **wrong)
    assert named in reason


def test_a_gpu_without_a_kernel_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    (reason,) = reasons("multicast")
    assert "transport multicast: compute capability 8.0" in reason


def _create_forbidden(rank):
    import os

    from sglang_tokenweave.peer import MulticastTransport

    os.environ["NCCL_NVLS_ENABLE"] = "0"
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    transport = MulticastTransport(torch.distributed.group.WORLD, device)
    with pytest.raises(DisagreementError) as caught:
        transport.allocate(64, 1024, BF16)
    transport.close()
    return str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_switch_forbids_the_multicast_transport_on_all_ranks():
    texts = run_ranks(_create_forbidden, 2)
    assert texts[0] == texts[1]
    assert "NCCL_NVLS_ENABLE=0 forbids multicast" in texts[0]


@pytest.fixture
def communicate(monkeypatch):
    """Return what makes a server's transport; engines that copy may be what cannot be made."""
    absent = {"copy engines"}

    def create(name, device, group, *rows, has_copy_engines, has_one_shot):
        if has_copy_engines and absent:
            raise DisagreementError("no copy engines here")
        made = {"copy engines": has_copy_engines, "one-shot": has_one_shot}
        return {name for name, is_made in made.items() if is_made}, rows

    monkeypatch.setattr(transports, "create", create)
    arguments = {"enable_dynamic_chunking": False, "max_running_requests": 8}
    monkeypatch.setattr(
        seams, "resolved_arguments", lambda: arguments | {"chunked_prefill_size": 2048}
    )
    hf_config = SimpleNamespace(hidden_size=64)
    runner = SimpleNamespace(
        device="cuda", dtype=BF16, model_config=SimpleNamespace(hf_config=hf_config)
    )

    def run(*added, has_all=False, **options):
        absent.clear() if has_all else absent.add("copy engines")
        config = TokenWeaveConfig(enabled=True, **options)
        monkeypatch.setattr(install, "state", install.State(config))
        thresholds = {"min_tokens": 9, "fuse_min_tokens": 0, "decode_min_tokens": 0}
        table = PlanTable.from_thresholds(**thresholds, ctas=config.ctas, fuse_ctas=16)
        table = PlanTable((*table.rows, *added))
        return install._communication(runner, SimpleNamespace(group=None), table)

    return run


ROWS = (2048, 64, BF16)


def test_a_measurement_has_all_that_it_may_choose(communicate):
    assert communicate(has_all=True, tune="auto") == ({"copy engines", "one-shot"}, ROWS)
    assert communicate(has_all=True, transport="peer", tune="off") == (set(), ROWS)
    assert install.state.notes == ()


def test_a_measurement_does_without_what_cannot_be_made(communicate):
    assert communicate(tune="auto") == (set(), ROWS)
    assert install.state.notes == ("copy engines and the one-shot op (no copy engines here)",)
    assert communicate(transport="peer", tune="off") == (set(), ROWS)
    assert install.state.notes == ()  # nothing asked for them
    assert communicate(transport="peer", min_tokens=99) == (set(), ROWS)
    assert install.state.notes == ()


def test_the_one_shot_op_is_made_for_a_table_that_names_it(communicate):
    few = PlanRow(Mode.DECODE, 1, Kind.FUSE)
    assert communicate(few, transport="peer", tune="off") == ({"one-shot"}, ROWS)
    assert communicate(few, tune="auto") == ({"one-shot"}, ROWS)  # without copy engines


@pytest.mark.parametrize("tune", ["off", "auto"])
def test_copy_engines_that_were_asked_for_and_cannot_be_made_are_an_error(tune, communicate):
    with pytest.raises(DisagreementError, match="no copy engines here"):
        communicate(transport="peer", ctas=0, tune=tune)


@pytest.fixture
def not_measurable(monkeypatch):
    """Return what lets a GPU server measure in vain, and gives its state and its runtime."""

    def measure(*_):
        raise NotMeasurableError("no time")

    monkeypatch.setattr(tuner, "measure", measure)
    monkeypatch.setattr(install, "_key", lambda _: None)
    monkeypatch.setattr(install, "as_group", lambda _: None)

    def run(pp_size=1, **options):
        state = install.State(TokenWeaveConfig(enabled=True, **options), pp_size=pp_size)
        monkeypatch.setattr(install, "state", state)
        place = SimpleNamespace(group=SimpleNamespace(cpu_group=None))
        state.runtime = SimpleNamespace(model=SimpleNamespace(place=place), is_active=True)
        install._measure(None, state.runtime)
        return state

    return run


def test_what_was_not_measured_runs_stock_unless_a_transport_is_named(not_measurable):
    state = not_measurable()
    assert (state.is_active, state.reasons) == (False, ("no tuned table: no time",))
    state = not_measurable(pp_size=2)
    assert state.reasons == ("no tuned table: not measured with pipeline stages",)
    state = not_measurable(transport="peer", strict=True)
    assert (state.is_active, state.notes) == (True, ("tuned table: no time",))
    for asked in ({"tune": "force", "transport": "peer"}, {}):
        with pytest.raises(install.RefusedError, match="no time"):
            not_measurable(strict=True, **asked)
