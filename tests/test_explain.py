"""`explain`: what it says of batches that were measured, lie between, below and above."""

import json
from pathlib import Path

import pytest
from tuned_tables import FUSE, KEY, WEAVE, bucket, table

from sglang_tokenweave import explain
from sglang_tokenweave.plan import BatchShape, Kind, Mode, plan_batch
from sglang_tokenweave.tuning.explanation import explain as explained
from sglang_tokenweave.tuning.rows import plan_table
from sglang_tokenweave.tuning.table import OFF, Bucket, Candidate, Measurement
from sglang_tokenweave.tuning.text import to_text
from sglang_tokenweave.waves import predicted_us

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "h200-tp8rank-tp2.yaml"
TABLE = table(
    bucket(256, fuse=99.0, weave=99.5),
    bucket(1024, WEAVE),
    bucket(2048, WEAVE),
    bucket(4096, FUSE),
    bucket(8, FUSE, Mode.DECODE, weave=95.0),
    bucket(64, FUSE, Mode.DECODE, weave=95.0),
)


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "tuned.yaml"
    found.write_text(to_text(TABLE))
    return str(found)


def said(capsys, *arguments):
    assert explain.main(arguments) == 0
    return capsys.readouterr().out


def test_a_measured_size(path, capsys):
    out = said(capsys, "--table", path, "--tokens", "724,300")
    first, *rest = out.splitlines()
    batch = BatchShape(Mode.PREFILL, (724, 300))
    plan = plan_batch(batch, plan_table(TABLE), KEY.layer, KEY.sms)
    assert plan.kind is Kind.WEAVE
    shown = f"weave (cut after {plan.cut}, 8 CTAs beside, 16 CTAs alone)"
    assert first == f"prefill, 1024 tokens of 2 requests: {shown}"
    assert rest[0] == "1024 tokens were measured."
    assert rest[1] == "At 1024 tokens weave took 80 us and off 100 us: 20.0 % less."
    assert len([line for line in rest if line.startswith(("off", "fuse", "weave"))]) == 3


def test_between_two_sizes_the_reason_is_the_lesser_choice(path, capsys):
    out = said(capsys, "--table", path, "--tokens", "500")
    assert "prefill, 500 tokens of 1 requests: off\n" in out
    assert "500 tokens lie between 256, where off was chosen, and 1024, where weave was" in out
    assert "the best other one, fuse, took 99 us and off 100 us; to count it has to gain 1.5" in out
    assert "measured at 256, us" in out
    assert "measured at 1024, us" in out


def test_a_choice_by_hand_is_called_that(path, capsys):
    assert "This choice was made by hand." in said(capsys, "--table", path, "--tokens", "4096")
    assert "by hand" not in said(capsys, "--table", path, "--tokens", "2048")


@pytest.mark.parametrize(("tokens", "what"), [("9", "fewer than any"), ("5000", "more than any")])
def test_outside_of_what_was_measured(path, capsys, tokens, what):
    out = said(capsys, "--table", path, "--tokens", tokens)
    assert f"{tokens} tokens are {what} measured size: such batches run stock." in out
    assert f"{tokens} tokens of 1 requests: off" in out


def test_decode_counts_requests(path, capsys):
    out = said(capsys, "--table", path, "--tokens", "32", "--mode", "decode")
    assert out.startswith("decode, 32 tokens of 32 requests: fuse (16 CTAs alone)")


def test_the_numbers_are_those_of_the_table_and_of_the_wave_model():
    found = explained(TABLE, BatchShape(Mode.PREFILL, (1500,)))
    times = {each.candidate: (each.below_us, each.above_us) for each in found.alternatives}
    assert times == {each.candidate: (each.us, each.us) for each in TABLE.buckets[1].measured}
    off, _, weave = found.alternatives
    assert off.predicted_us == pytest.approx(
        80 * sum(predicted_us(gemm, 1500, 132) for gemm in KEY.layer.gemms), abs=0.1
    )
    assert weave.predicted_us == pytest.approx(
        80
        * sum(
            predicted_us(gemm, part, 124)
            for gemm in KEY.layer.gemms
            for part in (weave.cut, 1500 - weave.cut)
        ),
        abs=0.1,
    )


def test_json(path, capsys):
    found = json.loads(said(capsys, "--table", path, "--tokens", "1024", "--json"))
    assert found["plan"]["kind"] == "weave"
    assert found["batch"] == {"mode": "prefill", "lengths": [1024]}
    assert [each["candidate"]["kind"] for each in found["alternatives"]] == ["off", "fuse", "weave"]
    assert found["below"] == found["above"] == 1024


@pytest.mark.parametrize(
    ("tokens", "mode", "message"),
    [
        ("1,x", "prefill", "--tokens is '1,x'; expected numbers such as 700,300"),
        ("0", "prefill", "lengths: got 0; expected positive integers"),
        ("3,3", "decode", "lengths: got 3; expected 1 token a decode request"),
    ],
)
def test_bad_arguments(path, capsys, tokens, mode, message):
    assert explain.main(["--table", path, "--tokens", tokens, "--mode", mode]) == 2
    assert message in capsys.readouterr().err


def test_bad_tables(path, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("format: 3")
    assert explain.main(["--table", str(tmp_path / "bad.yaml"), "--tokens", "5"]) == 2
    assert "bad.yaml, line 1" in capsys.readouterr().err
    (tmp_path / "empty.yaml").write_text(to_text(table()))
    assert explain.main(["--table", str(tmp_path / "empty.yaml"), "--tokens", "5"]) == 2
    assert "the table holds no sizes of mode prefill" in capsys.readouterr().err


def test_the_one_shot_op_is_named(tmp_path, capsys):
    one_shot = Candidate(Kind.FUSE)
    measured = (Measurement(OFF, 100.0, 1.0, 15), Measurement(one_shot, 50.0, 1.0, 15))
    (tmp_path / "t.yaml").write_text(to_text(table(Bucket(Mode.DECODE, 8, one_shot, measured))))
    arguments = ("--table", str(tmp_path / "t.yaml"), "--tokens", "1,1,1,1,1,1,1,1")
    assert ": fuse (one-shot)" in said(capsys, *arguments, "--mode", "decode")


def test_the_copy_engines_are_named_beside_the_computation(capsys):
    out = said(capsys, "--table", str(EXAMPLE), "--tokens", "8192")
    assert out.startswith("prefill, 8192 tokens of 1 requests: weave (cut after 3072, copy engines")
    assert "off  " in out
