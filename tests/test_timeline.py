"""The timeline: on constructed profiles whose answer is known, moment by moment."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_traces import (
    ADD_NORM,
    ATTENTION,
    COMPUTE,
    COPY,
    FUSED,
    GATHER,
    GEMM,
    LANE,
    LOCAL_COPY,
    NCCL,
    NORM,
    SIDE,
    SILU,
    copied,
    event,
    measured,
    named,
    stock,
    woven,
    write,
)

from sglang_tokenweave.timeline import kinds, page, words
from sglang_tokenweave.timeline.__main__ import main
from sglang_tokenweave.timeline.intervals import Intervals
from sglang_tokenweave.timeline.kinds import Kind
from sglang_tokenweave.timeline.layers import OUTSIDE, Place
from sglang_tokenweave.timeline.overlap import Total

ROOT = Path(__file__).resolve().parents[1]


def us(hidden, exposed):
    return Total(round(1000 * hidden), round(1000 * exposed))


# --- sets of moments

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)


def moments(pairs):
    return {moment for start, end in pairs for moment in range(start, end)}


@given(spans, spans)
def test_intervals_are_sets_of_moments(first, second):
    a, b = Intervals.of(first), Intervals.of(second)
    for found, expected in (
        (a, moments(first)),
        (a | b, moments(first) | moments(second)),
        (a & b, moments(first) & moments(second)),
        (a - b, moments(first) - moments(second)),
    ):
        assert moments(found.spans) == expected
        assert found.length == len(expected)
        assert found == Intervals.of(found.spans)  # disjoint, ascending, none touching


# --- hidden and exposed

activities = st.lists(
    st.tuples(
        st.sampled_from((GEMM, ATTENTION, NCCL, FUSED, GATHER)),
        st.integers(0, 300),
        st.integers(0, 60),
        st.sampled_from((COMPUTE, SIDE, LANE)),
    ),
    min_size=1,
    max_size=25,
)


def nanoseconds(each):
    """Make an event of whole nanoseconds out of a drawn one."""
    name, start, length, stream = each
    return event(name, start / 1000, length / 1000, stream)


def one_by_one(drawn):
    """Hidden and exposed moments, in the words of the definition."""
    communicates = {GEMM: False, ATTENTION: False, NCCL: True, FUSED: True, GATHER: True}
    hidden = exposed = 0
    for moment in range(400):
        running = [(n, s) for n, start, length, s in drawn if start <= moment < start + length]
        communicating = {stream for name, stream in running if communicates[name]}
        computing = {stream for name, stream in running if not communicates[name]}
        if communicating:
            hidden += bool(computing - communicating)
            exposed += not computing - communicating
    return Total(hidden, exposed)


@given(activities, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_every_moment_of_communication_is_either_hidden_or_exposed(drawn, random):
    if not any(name in (NCCL, FUSED, GATHER) for name, *_ in drawn):
        drawn = [*drawn, (NCCL, 0, 5, COMPUTE)]
    expected = one_by_one(drawn)
    found = measured([nanoseconds(each) for each in drawn])
    assert found.total == expected
    communication = Intervals.of(
        span for each in found.timed for span in each.operation.intervals.spans
    )
    assert expected.length == communication.length
    assert sum(each.length for each in found.by_place.values()) == expected.length

    shuffled = list(drawn)
    random.shuffle(shuffled)
    streams = {COMPUTE: 3, SIDE: 99, LANE: 20}
    moved = [(name, start + 1000, length, streams[s]) for name, start, length, s in shuffled]
    assert measured([nanoseconds(each) for each in moved]).total == expected


def test_stock_exposes_everything():
    found = measured(stock(3))
    assert found.parts == 1
    assert found.by_place[OUTSIDE] == us(0, 20)  # embedding and logits
    assert [found.by_place[Place(layer, "MLP")] for layer in range(3)] == [us(0, 10)] * 3
    assert found.idle == 0
    text = words.sentence(found)
    assert text.startswith("0 % of communication hidden (0.0 us of 80 us); exposed: 20 us outside")
    assert text.endswith("10 us in layer 0 attention, 10 us in layer 0 MLP, 40 us in 4 more.")


def test_woven_exposes_only_the_last_sum():
    found = measured(woven(3))
    assert found.parts == 2
    blocks = [(layer, block) for layer in range(3) for block in ("attention", "MLP")]
    assert list(found.by_place) == [Place(*each) for each in blocks]
    assert [found.by_place[Place(*each)] for each in blocks] == [us(16, 0)] * 5 + [us(8, 8)]
    expected = "92 % of communication hidden (88 us of 96 us); exposed: 8.0 us in layer 2 MLP."
    assert words.sentence(found) == expected
    assert words.comparison(found, measured(stock(3))).startswith(
        "Step 128 us against 300 us: 2.34x"
    )


def test_copies_norms_and_flags_of_the_copy_engines_are_one_sum():
    for name in (COPY, LOCAL_COPY):  # memory of a peer may be mapped into our addresses
        found = measured(copied(4, copies=3, name=name))
        assert [each.operation.kind for each in found.timed] == [Kind.SUM] * 4
        assert [len(each.operation.activities) for each in found.timed] == [7] * 4
        # 10 + 20 * 3 + 7 = 77 of the 80 us that the GEMM lasts
        assert found.total == us(28, 0)
    flags = [event("exchange_flags", 13.5 + 20 * i, 1, SIDE) for i in range(4)]
    found = measured([*copied(4), *flags])
    assert [len(each.operation.activities) for each in found.timed] == [6] * 4


def test_local_copies_are_no_communication():
    events = [*stock(1), event(LOCAL_COPY, 3, 4, LANE, cat="gpu_memcpy")]
    assert measured(events).total == measured(stock(1)).total


def test_a_kernel_launched_early_on_the_same_stream_hides_nothing():
    events = [event(NCCL, 0, 10), event(GEMM, 6, 10)]
    assert measured(events).total == us(0, 10)
    events = [event(NCCL, 0, 10, SIDE), event(GEMM, 6, 10)]
    assert measured(events).total == us(4, 6)


def test_ranges_of_the_program_name_the_layers():
    events = [
        named("model.layers.17", 0, 100, 1),
        named("mlp", 40, 60, 2),
        event(NCCL, 10, 5),
        event(NCCL, 50, 5),
        event(NCCL, 200, 5),
    ]
    assert [str(each.place) for each in measured(events).timed] == [
        "layer 17",
        "layer 17 MLP",
        "outside the layers",
    ]


# --- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (FUSED, Kind.SUM),
        ("_Z17allreduce_rmsnormI6ConfigE6Params", Kind.SUM),
        (ADD_NORM, Kind.NORM),
        ("_Z11add_rmsnormILi512EEv6Params", Kind.NORM),
        ("void exchange_flags<32>(Params)", Kind.FLAGS),
        (NORM, Kind.COMPUTATION),
        ("void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>()", Kind.COMPUTATION),
        ("void fused_add_rmsnorm_kernel<8>()", Kind.COMPUTATION),
        (NCCL, Kind.SUM),
        ("ncclKernel_AllReduce_RING_LL_Sum_bf16(ncclDevComm*)", Kind.SUM),
        ("ncclSymkDevKernel_AllReduce_AGxLL_R_sum_bf16(ncclSymkDevWorkArgs)", Kind.SUM),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", Kind.OTHER),
        ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>()", Kind.SUM),
        ("void (anonymous namespace)::all_reduce_2shot_pull_kernel<bf16, 2>()", Kind.SUM),
        ("void (anonymous)::two_shot_all_reduce_kernel_inplace<c10::BFloat16>()", Kind.SUM),
        ("void (anonymous)::one_shot_all_reduce_kernel<c10::BFloat16, 16, 2>()", Kind.SUM),
        ("void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>()", Kind.SUM),
        ("void flashinfer::x::allreduce_fusion_kernel_twoshot_sync<1>()", Kind.SUM),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>()", Kind.COMPUTATION),
        (GEMM, Kind.COMPUTATION),
        (ATTENTION, Kind.COMPUTATION),
    ],
)  # fmt: skip
def test_kernels_are_known_by_name(name, expected):
    assert kinds.label(name, "kernel").kind is expected


def test_the_names_of_our_kernels_are_those_of_their_sources():
    declared = set()
    for source in (ROOT / "cuda").glob("*.cu"):
        text = re.sub(r"__launch_bounds__\(.*?\)\s*\n?", "", source.read_text(), flags=re.S)
        declared |= {source.stem} if "__global__" in text else set()
    ours = {name for name in declared if kinds.label(name, "kernel").family == "tokenweave"}
    assert ours == declared - {"sm_limits"}  # of a benchmark


@pytest.mark.parametrize(
    ("name", "is_attention", "is_activation"),
    [
        (ATTENTION, True, False),
        (
            "void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::TileScheduler> >()",
            True,
            False,
        ),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128> >()", True, False),
        ("void flashinfer::BatchPrefillWithPagedKVCacheKernel<KTraits, Params>()", True, False),
        ("fmhaSm100aKernel_QkvBfloat16OBfloat16H128PagedKvCausalP32VarSeqQ128Kv128", True, False),
        ("_fwd_kernel", True, False),
        ("void flash::flash_fwd_splitkv_combine_kernel<...>()", False, False),
        ("void flash::prepare_varlen_num_blocks_kernel<1>()", False, False),
        (SILU, False, True),
        (NORM, False, False),
        (GEMM, False, False),
    ],
)
def test_attention_and_activation_are_told_from_what_is_beside(name, is_attention, is_activation):
    assert kinds.is_attention(name) is is_attention
    assert kinds.is_activation(name) is is_activation


# --- what is written


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.titles, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "title":
            self.titles.append(data)
        self.inside = None


def test_the_page_needs_nothing_else_and_shows_everything():
    events = [*woven(2), event('<script>alert("x")</script>', 1, 2, LANE)]
    found = measured(events)
    text = page.page([("first", found), ("second", measured(stock(2)))])
    tags = Tags(text)
    for tag, attributes in tags.seen:
        assert tag not in ("link", "img", "iframe", "object"), tag
        assert not {"src", "href", "onload"} & set(attributes), (tag, attributes)
    assert re.findall(r"https?:|//cdn|@import|url\(", text) == []
    assert [tag for tag, _ in tags.seen].count("script") == 1  # ours; a kernel's name is text
    told = [title for title in tags.titles if title.startswith(("layer", "outside"))]
    assert sum("hidden" in title for title in told) == len(
        [s for o in (found, measured(stock(2))) for t in o.timed
         for s in (*t.hidden.spans, *t.exposed.spans)]
    )  # fmt: skip
    for each in found.labelled:
        assert any(title.startswith(each.activity.name) for title in tags.titles)
    assert words.sentence(found) in text


def test_bars_lie_where_the_profile_says():
    text = page.page([("t", measured(woven(1)))])
    bars = [attributes for tag, attributes in Tags(text).seen if tag == "rect"]
    starts = {float(bar["x"].rstrip("%")) for bar in bars}
    ends = {float(bar["x"].rstrip("%")) + float(bar["width"].rstrip("%")) for bar in bars}
    assert min(starts) == 0
    assert max(ends) == pytest.approx(100, abs=1e-3)
    # 48 us: attention of the second half runs from 10 to 15.
    assert any(abs(start - 100 * 10 / 48) < 1e-3 for start in starts)


def test_command_writes_both_files_and_says_the_sentence(tmp_path, capsys):
    trace = write(tmp_path / "1.TP-0.trace.json.gz", woven(3))
    other = write(tmp_path / "stock.trace.json", stock(3))
    out = tmp_path / "out"
    assert main([str(trace), "--output", str(out), "--compare", str(other)]) == 0
    said = capsys.readouterr().out
    assert "92 % of communication hidden" in said
    assert "0 % of communication hidden" in said
    assert "2.34x" in said
    assert (out / "1.TP-0-step0.html").read_text().startswith("<!DOCTYPE html>")
    assert (out / "1.TP-0-step0.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(trace), "--list"]) == 0
    assert "0: step[EXTEND bs=1 toks=300], 128 us, 36 activities" in capsys.readouterr().out


def test_command_fails_in_a_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "none.json"), "--compare-step", "1"])
    assert stopped.value.code == 2


def test_without_matplotlib_the_page_is_written_and_that_is_said(tmp_path):
    trace = write(tmp_path / "a.trace.json", stock(1))
    hide = (
        "import sys, importlib.util as u; f = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'matplotlib' else f(n, *a); "
        "from sglang_tokenweave.timeline.__main__ import main; "
        "code = main(sys.argv[1:]); "
        "assert not {'torch', 'sglang', 'matplotlib'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide, trace, "--output", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no picture: it needs matplotlib" in done.stderr
    assert [path.name for path in tmp_path.glob("*step0*")] == ["a-step0.html"]


def test_only_everything_is_100_percent():
    assert words.percent(9999, 10000) == "99 %"
    assert words.percent(1, 10000) == "1 %"
    assert words.percent(5, 5) == "100 %"
    assert words.percent(0, 5) == "0 %"
