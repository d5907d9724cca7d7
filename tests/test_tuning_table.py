"""The tuned table: its file, its errors, what is chosen, and what the planner makes of it."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned_tables import FUSE, KEY, WEAVE, bucket, table, tables, times

from sglang_tokenweave.plan import BatchShape, Kind, Mode, plan_batch, plan_unsplit
from sglang_tokenweave.tuning.nodes import TableError
from sglang_tokenweave.tuning.rows import gain_permille, plan_table
from sglang_tokenweave.tuning.table import (
    OFF,
    Bucket,
    Candidate,
    Measurement,
    choose,
    noise_us,
)
from sglang_tokenweave.tuning.text import MOST_BYTES, from_text, read_file, to_text
from sglang_tokenweave.waves import best_cut, extra_permille

ROOT = Path(__file__).resolve().parents[1]
GOOD = table(
    bucket(64), bucket(1024, WEAVE), bucket(2048, WEAVE), bucket(8, FUSE, Mode.DECODE, weave=95.0)
)
TEXT = to_text(GOOD)


@given(tables)
@settings(deadline=None)
def test_round_trip(drawn):
    text = to_text(drawn)
    assert from_text(text) == drawn
    assert to_text(from_text(text)) == text


def test_the_file_is_one_measurement_a_line_and_a_changed_choice_one_changed_line():
    assert (
        "  - {kind: weave, ctas: 8, fuse_ctas: 16, us: 80.0, spread_us: 1.0, rounds: 15}\n" in TEXT
    )
    edited = to_text(table(*(replace(each, chosen=OFF) for each in GOOD.buckets)))
    changed = [a for a, b in zip(TEXT.splitlines(), edited.splitlines(), strict=True) if a != b]
    assert changed == [
        "  chosen: {kind: weave, ctas: 8, fuse_ctas: 16}",
        "  chosen: {kind: weave, ctas: 8, fuse_ctas: 16}",
        "  chosen: {kind: fuse, fuse_ctas: 16}",
    ]


def test_the_file_may_be_written_in_any_style_of_yaml():
    text = TEXT.replace(
        "- {kind: off, us: 100.0, spread_us: 1.0, rounds: 15}",
        '- kind: "off"\n    us: 100\n    spread_us: 1\n    rounds: 15',
    )
    assert text != TEXT
    assert from_text(text) == GOOD


OFF_LINE = "- {kind: off, us: 100.0, spread_us: 1.0, rounds: 15}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "format: 2",
            "format: 3",
            r"line 2, field format: got 3; this release reads 2: tune again",
        ),
        ("format: 2\n", "", r"line 2, field of the table: format is missing"),
        ("sms: 132", "sms: 0", r"line 6, field key\.sms: got 0; expected an integer from 1"),
        ("sms: 132", "sms: 1e2", r"line 6, field key\.sms: got '1e2'; expected a whole number"),
        ("sms: 132", "sms: '132'", r"line 6, field key\.sms: got '132'; expected a whole number"),
        ("sms: 132", "sms: 9", r"field buckets: 8 CTAs of 9 SMs leave fewer than 16"),
        ("sms: 132", "sms: {a: 1}", r"line 6, field key\.sms: got fields; expected one value"),
        ("tp_size: 8", "tp_size: 5", r"line 5, field key: heads is 64; it must be a multiple of 5"),
        ('"NVIDIA H200"', '"caf\\u00e9"', r"line 5, field key\.gpu: got 'café'; expected 1 to 200"),
        ('"NVIDIA H200"', '""', r"line 5, field key\.gpu: got ''"),
        ("  layers: 80\n", "", r"line 5, field key: layers is missing"),
        (
            "  layers: 80\n",
            "  layers: 80\n  colour: 1\n",
            r"field key\.colour: unknown; expected gpu",
        ),
        ("  layers: 80\n", "  layers: 80\n  layers: 81\n", r"field key\.layers: given twice"),
        ("mode: decode", "mode: mixed", r"field buckets\[3\]\.mode: got <Mode.MIXED.*prefill, dec"),
        ("mode: decode", "mode: [decode]", r"buckets\[3\]\.mode: got a list; expected one value"),
        ("tokens: 64", "tokens: -64", r"buckets\[0\]\.tokens: got -64; expected an integer from 1"),
        ("tokens: 64", "tokens: 1024", r"field buckets: two of mode prefill and 1024 tokens"),
        (
            OFF_LINE,
            "- {kind: of, us: 1, spread_us: 1, rounds: 5}",
            r"\[0\]\.kind: got 'of'; .* off, fuse, weave",
        ),
        (
            OFF_LINE,
            "- {kind: off, us: .nan, spread_us: 1, rounds: 5}",
            r"\[0\]\.us: got '\.nan'; expected a num",
        ),
        (
            OFF_LINE,
            "- {kind: off, us: -1, spread_us: 1, rounds: 5}",
            r"\[0\]\.us: got '-1'; expected a number",
        ),
        (
            OFF_LINE,
            "- {kind: off, us: 0, spread_us: 1, rounds: 5}",
            r"\[0\]\.us: got 0; expected more",
        ),
        (
            OFF_LINE,
            "- {kind: off, us: 9999999999, spread_us: 1, rounds: 5}",
            r"got 9999999999.0; expected micro",
        ),
        (OFF_LINE, "- {kind: off, us: 1, spread_us: 1e999, rounds: 5}", r"spread_us: got '1e999'"),
        (OFF_LINE, "- {kind: off, us: 1, rounds: 5}", r"measured\[0\]: spread_us is missing"),
        (
            OFF_LINE,
            "- {kind: off, ctas: 8, us: 1, spread_us: 1, rounds: 5}",
            r"\.ctas: got 8; expected 0",
        ),
        (
            OFF_LINE,
            "- off",
            r"measured\[0\]: got 'off'; expected fields: kind, us, spread_us, rounds",
        ),
        (OFF_LINE, "", r"buckets\[0\]\.measured: kind off is missing"),
        ("fuse_ctas: 16}", "fuse_ctas: 15}", r"fuse_ctas: got 15; expected an even number"),
        ("fuse_ctas: 16}", "fuse_ctas: 32}", r"chosen: .* was not measured; choose one that was"),
        ("fuse_ctas: 16}", "fuse_ctas: 16, engine: copy}", r"engine\W+unknown"),
        ("fuse_ctas: 16}", "ctas: 8, fuse_ctas: 16}", r"(ctas: got 8; expected 0|given twice)"),
        ("buckets:", "buckets: 1\nother:", r"(unknown|not YAML)"),
        ("key:", "key: &a", r"line 4: anchors and aliases are not allowed"),
        ("format: 2", "format: *a", r"line 2: anchors and aliases are not allowed"),
        ("key:", "key: !!python/object:os.system", r"line 4: tag tag:yaml.org,2002:python/ob"),
        ("key:", "key", r"line \d+: the text is not YAML"),
        ("format: 2", "format: [[[[[[[[1]]]]]]]]", r"line 2: nested too deeply"),
        ("format: 2", "? [a]\n: 1", r"line 2, field \(not a word\): unknown"),
        ("H200", "H\x01", r"line \d+: the text is not YAML"),
    ],
)
def test_errors_name_line_and_field(old, new, message):
    assert old in TEXT
    count = -1 if old.endswith("_ctas: 16}") else 1
    with pytest.raises(TableError, match=message):
        from_text(TEXT.replace(old, new, count))


@pytest.mark.parametrize("text", ["", "# nothing", "7", "[]", "a: 1\n---\nb: 2", "[" * 9999, "\0"])
def test_no_table_at_all(text):
    with pytest.raises(TableError, match=r"^line \d+"):
        from_text(text)


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "tuned.yaml"
    with pytest.raises(TableError, match=r"tuned\.yaml: cannot be read: .*No such file"):
        read_file(path)
    path.write_bytes(b"\xff")
    with pytest.raises(TableError, match=r"tuned\.yaml: cannot be read: .*codec"):
        read_file(path)
    path.write_text("#" * (MOST_BYTES + 1))
    with pytest.raises(TableError, match=r"tuned\.yaml, line 1: the text is longer than"):
        read_file(path)
    path.write_text(TEXT)
    assert read_file(path) == (GOOD, TEXT)


@given(times, st.lists(st.tuples(times, times), max_size=5))
@settings(deadline=None)
def test_nothing_is_chosen_that_did_not_beat_off_by_more_than_the_noise(off_us, others):
    off = Measurement(OFF, off_us, 0.5, 9)
    measured = [off]
    for index, (us, spread) in enumerate(others):
        measured.append(Measurement(Candidate(Kind.FUSE, fuse_ctas=2 * index + 2), us, spread, 9))
    chosen = choose(measured)
    passing = [each for each in measured[1:] if off.us - each.us > noise_us(off, each)]
    if not passing:
        assert chosen == OFF
        return
    (best,) = [each for each in measured if each.candidate == chosen]
    assert best in passing
    assert best.us == min(each.us for each in passing)
    assert best.us < 0.985 * off_us


@pytest.mark.parametrize(
    ("rounds", "gain", "least", "most"),
    [(9, 0.0, 0.0, 0.04), (15, 0.0, 0.0, 0.04), (15, 0.07, 0.7, 1.0), (24, 0.07, 0.9, 1.0)],
)
def test_chance_seldom_chooses_and_seldom_hides_a_gain(rounds, gain, least, most):
    """Runs with a normal error of 5 %. 2000 tries: a share is off by 0.4 % at 3 %."""
    random = Random(0)
    chosen = 0
    for _ in range(2000):
        off, weave = (
            [random.gauss(mean, 5.0) for _ in range(rounds)] for mean in (100, 100 - 100 * gain)
        )
        chosen += choose([Measurement.of(OFF, off), Measurement.of(WEAVE, weave)]) == WEAVE
    assert least <= chosen / 2000 <= most


@pytest.mark.parametrize(("rounds", "chosen"), [((9, 9), WEAVE), ((9, 8), OFF), ((4, 4), OFF)])
def test_what_ran_in_fewer_rounds_than_off_is_not_chosen(rounds, chosen):
    off, weave = rounds
    measured = (Measurement(OFF, 100.0, 1.0, off), Measurement(WEAVE, 50.0, 1.0, weave))
    assert choose(measured) == chosen


def test_a_summary_of_rounds():
    assert Measurement.of(OFF, [5.0, 1.0, 2.0, 3.0, 100.0]) == Measurement(OFF, 3.0, 1.5, 5)
    assert Measurement.of(OFF, [0.0]) == Measurement(OFF, 0.1, 0.0, 1)


def test_a_choice_by_hand_is_kept_and_noticed():
    assert not bucket(64, WEAVE).is_edited
    assert bucket(64, FUSE).is_edited
    assert plan_table(table(bucket(64, FUSE))).lookup(Mode.PREFILL, 64).kind is Kind.FUSE


def kinds(plans, mode=Mode.PREFILL, sizes=range(1, 40)):
    return {size: plans.lookup(mode, size).kind for size in sizes if plans.lookup(mode, size)}


def test_between_two_sizes_the_lesser_of_their_choices_holds():
    plans = plan_table(
        table(bucket(4), bucket(8, FUSE), bucket(12, WEAVE), bucket(16, WEAVE), bucket(17, OFF))
    )
    expected = dict.fromkeys([*range(4, 8), *range(17, 40)], Kind.OFF)
    expected |= dict.fromkeys(range(8, 12), Kind.FUSE)
    expected |= dict.fromkeys(range(12, 17), Kind.WEAVE)
    assert kinds(plans) == expected
    assert kinds(plans, Mode.DECODE) == {}
    assert kinds(plans, Mode.MIXED) == expected


def test_nothing_is_fused_above_the_sizes_where_that_was_measured():
    """A batch of 15 tokens runs in a graph for 16, so that graph does what holds for 15."""
    plans = plan_table(table(bucket(8, FUSE), bucket(16, WEAVE), bucket(32, WEAVE)))
    unsplit = {n: plan_unsplit(Mode.PREFILL, n, plans).kind for n in (7, 8, 15, 16, 17, 31, 32, 33)}
    assert [n for n, kind in unsplit.items() if kind is Kind.FUSE] == [8, 15, 16]


@given(tables, st.sampled_from(Mode), st.integers(1, 25_000))
@settings(deadline=None, max_examples=300)
def test_nothing_is_woven_that_is_not_woven_on_both_sides(drawn, mode, num_tokens):
    row = plan_table(drawn).lookup(mode, num_tokens)
    of_mode = drawn.of_mode(mode)
    below = [each for each in of_mode if each.tokens <= num_tokens]
    above = [each for each in of_mode if each.tokens >= num_tokens]
    if row is None or row.kind is Kind.OFF:
        return
    assert below, "nothing was measured below, and it is not left alone"
    assert above, "nothing was measured above, and it is not left alone"
    sides = {below[-1].chosen.kind, above[0].chosen.kind}
    if row.kind is Kind.WEAVE:
        assert sides == {Kind.WEAVE}
    else:
        assert Kind.OFF not in sides


def test_a_gap_is_woven_only_where_its_extra_waves_leave_something_of_the_gain():
    key = replace(KEY, tp_size=4)  # a layer whose waves are whole at both sides
    sides = (bucket(1024, WEAVE, weave=97.0), bucket(2048, WEAVE, weave=97.0))
    plans = plan_table(table(*sides, key=key))
    row = plans.lookup(Mode.PREFILL, 1500)
    sms = KEY.sms - 8
    at_sides = [
        extra_permille(key.layer, each, best_cut((each,), key.layer, sms), sms)
        for each in (1024, 2048)
    ]
    assert row.max_extra_permille == max(at_sides) + 30
    seen = set()
    for num_tokens in range(1025, 2048, 7):
        plan = plan_batch(BatchShape(Mode.PREFILL, (num_tokens,)), plans, key.layer, KEY.sms)
        cut = best_cut((num_tokens,), key.layer, sms)
        extra = extra_permille(key.layer, num_tokens, cut, sms)
        assert (plan.kind is Kind.WEAVE) == (extra <= row.max_extra_permille)
        assert plan.kind is not Kind.FUSE
        seen.add(plan.kind)
    assert seen == {Kind.OFF, Kind.WEAVE}, "the sample holds both"


def test_a_gap_is_cut_as_the_planner_does():
    moved = replace(WEAVE, cut_offset=256)
    measured = (Measurement(OFF, 100.0, 0.0, 9), Measurement(moved, 50.0, 0.0, 9))
    sides = [replace(bucket(tokens), chosen=moved, measured=measured) for tokens in (1024, 2048)]
    plans = plan_table(table(*sides))
    offsets = [plans.lookup(Mode.PREFILL, tokens).cut_offset for tokens in (1024, 1500, 2048)]
    assert offsets == [256, 0, 256]


def test_a_loss_chosen_by_hand_is_honoured_where_it_was_measured():
    losing = bucket(1024, WEAVE, weave=130.0)
    assert gain_permille(losing) == -300
    plans = plan_table(table(losing))
    plan = plan_batch(BatchShape(Mode.PREFILL, (1024,)), plans, KEY.layer, KEY.sms)
    assert plan.kind is Kind.WEAVE


def test_a_loss_chosen_by_hand_is_honoured_between_two_sizes_too():
    plans = plan_table(table(bucket(64, WEAVE, weave=130.0), bucket(512, WEAVE, weave=130.0)))
    assert {plans.lookup(Mode.PREFILL, size).max_extra_permille for size in (65, 511)} == {None}
    assert set(kinds(plans, sizes=range(64, 513)).values()) == {Kind.WEAVE}


def test_the_cut_moves_by_the_offset_and_stays_inside():
    layer, sms = KEY.layer, KEY.sms - 8
    for offset in (-9999, -256, 0, 256, 9999):
        woven = replace(WEAVE, cut_offset=offset)
        measured = (Measurement(OFF, 100.0, 0.0, 9), Measurement(woven, 50.0, 0.0, 9))
        plans = plan_table(table(replace(bucket(2048), chosen=woven, measured=measured)))
        plan = plan_batch(BatchShape(Mode.PREFILL, (2048,)), plans, layer, KEY.sms)
        expected = best_cut((2048,), layer, sms) + offset
        assert plan.cut == min(max(expected, 1), 2047)


def test_keys_that_differ_say_where():
    assert KEY.differences(KEY) == ""
    other = replace(KEY, gpu="NVIDIA B200", tp_size=4)
    assert KEY.differences(other) == "gpu 'NVIDIA H200' (here 'NVIDIA B200'), tp_size 8 (here 4)"


def test_copy_engines_are_told_by_zero_ctas_and_need_the_transport_peer():
    copying = Candidate(Kind.WEAVE, fuse_ctas=16)
    measured = tuple(Measurement(each, 50.0, 1.0, 15) for each in (OFF, copying))
    found = table(Bucket(Mode.PREFILL, 64, copying, measured))
    assert "chosen: {kind: weave, ctas: 0, fuse_ctas: 16}" in to_text(found)
    assert from_text(to_text(found)) == found
    assert plan_table(found).needs_copy_engines
    assert not plan_table(table(bucket(64, WEAVE))).needs_copy_engines
    with pytest.raises(ValueError, match="'multicast'; the copy engines serve the transport peer"):
        replace(found, key=replace(KEY, transport="multicast"))


def test_the_one_shot_op_is_told_by_zero_ctas_and_takes_few_tokens():
    one_shot = Candidate(Kind.FUSE)
    measured = tuple(Measurement(each, 50.0, 1.0, 15) for each in (OFF, one_shot))
    found = table(Bucket(Mode.DECODE, 512, one_shot, measured))
    assert "chosen: {kind: fuse, fuse_ctas: 0}" in to_text(found)
    assert from_text(to_text(found)) == found
    assert plan_table(found).needs_one_shot
    assert not plan_table(table(bucket(64, FUSE))).needs_one_shot
    with pytest.raises(ValueError, match="which is the one-shot op; it takes at most 512 tokens"):
        Bucket(Mode.DECODE, 513, one_shot, measured)


MEASURED = [
    ROOT / "examples" / "h200-tp8rank-tp2.yaml",
    *sorted((ROOT / "benchmarks" / "results" / "tables").glob("*-h200x?.yaml")),
]


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_what_gpus_measured_bears_out_the_choice(path):
    """The choice is within 2 % of all that ran, of which the medians' own spreads are half."""
    found, _ = read_file(path)
    assert [each.tokens for each in found.of_mode(Mode.PREFILL)] == [64 << n for n in range(8)]
    for size in found.buckets:
        us = {each.candidate: each.us for each in size.measured}
        assert us[size.chosen] <= 1.02 * min(us.values())


def test_what_gpus_measured_bears_out_the_planners_cut():
    """Of the cuts that were tried with the chosen CTAs, the planner's is within 2 % of the best.

    One may be off by half a per cent more: two medians with spreads of 1.3 and 2.6 % are compared.
    """
    losses = []
    for path in MEASURED:
        found, _ = read_file(path)
        for size in found.of_mode(Mode.PREFILL):
            us = {each.candidate: each.us for each in size.measured}
            planned = replace(size.chosen, cut_offset=0)
            cuts = [us[each] for each in us if replace(each, cut_offset=0) == planned]
            if planned in us and len(cuts) > 1:  # a table made by an older planner may lack it
                losses.append(us[planned] / min(cuts) - 1)
    assert len(losses) >= 12
    assert sum(loss > 0.02 for loss in losses) <= 1
    assert max(losses) <= 0.025
    assert sum(losses) / len(losses) <= 0.005
