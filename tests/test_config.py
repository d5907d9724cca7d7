"""The configuration refuses by name what it does not understand."""

import argparse
import json

import pytest

from sglang_tokenweave import flags
from sglang_tokenweave.config import ENVIRONMENT_VARIABLE, ConfigError, TokenWeaveConfig, export


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min_token": 4}, "unknown TokenWeave option 'min_token'"),
        ({"min_tokens": "4"}, "--tokenweave-min-tokens"),
        ({"min_tokens": True}, "must be of type int"),
        ({"min_tokens": 1}, "must be at least 2"),
        ({"fuse_min_tokens": -1}, "--tokenweave-fuse-min-tokens"),
        ({"decode_min_tokens": 1}, "cannot be split"),
        ({"log_interval": -1}, "--tokenweave-log-interval"),
        ({"ctas": 7}, "even"),
        ({"ctas": -2}, "at least 0"),
        ({"ctas": 0}, "transport.* is 'auto'; the copy engines serve the transport peer only"),
        ({"ctas": 0, "transport": "multicast"}, "the copy engines serve the transport peer only"),
        ({"fuse_ctas": 0}, "at least 2"),
        ({"transport": "carrier-pigeon"}, "auto, reference"),
        ({"fuse_min_tokens": 64, "min_tokens": 64}, "smaller than the second"),
        ({"strict": 1}, "must be of type bool"),
    ],
)
def test_bad_options_are_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=named):
        TokenWeaveConfig.from_mapping({"enabled": True, **options})


def test_environment_carries_what_was_exported():
    environment = {}
    export({"enabled": True, "min_tokens": 64}, environment)
    export({"strict": True}, environment)
    config = TokenWeaveConfig.from_environment(environment)
    assert (config.enabled, config.min_tokens, config.strict) == (True, 64, True)


def test_empty_environment_is_off():
    assert not TokenWeaveConfig.from_environment({}).enabled


@pytest.mark.parametrize("text", ["{", "[]", "3", '"min_tokens"'])
def test_environment_that_is_no_json_object_is_refused(text):
    with pytest.raises(ConfigError, match=ENVIRONMENT_VARIABLE):
        TokenWeaveConfig.from_environment({ENVIRONMENT_VARIABLE: text})


def test_options_without_the_switch_contradict():
    text = json.dumps({"min_tokens": 64})
    with pytest.raises(ConfigError, match="TokenWeave is off: add --enable-tokenweave"):
        TokenWeaveConfig.from_environment({ENVIRONMENT_VARIABLE: text})


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "{}")
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path")
    flags.add_arguments(None, parser)
    return parser


def test_flags_reach_the_environment_and_not_the_namespace(parser):
    namespace = parser.parse_args(
        ["--enable-tokenweave", "--tokenweave-min-tokens", "64", "--model-path", "m"]
    )
    assert vars(namespace) == {"model_path": "m"}
    config = TokenWeaveConfig.from_environment()
    assert (config.enabled, config.min_tokens) == (True, 64)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokenweave-min-tokens", "many"], "--tokenweave-min-tokens"),
        (["--tokenweave-transport", "smoke"], "--tokenweave-transport"),
        (["--tokenweave-foo"], "--tokenweave-foo"),
    ],
)
def test_bad_flags_leave_with_status_2(parser, arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--enable-tokenweave", *arguments])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_contradiction_leaves_with_status_2_and_one_line(monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, json.dumps({"strict": True}))
    with pytest.raises(SystemExit) as stop:
        flags.read_or_exit()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--tokenweave-strict (strict) given" in error


def test_help_shows_every_option(parser):
    text = parser.format_help()
    for name in TokenWeaveConfig().as_dict():
        assert name.replace("_", "-") in text or name == "enabled"
    assert "--enable-tokenweave" in text


@pytest.mark.parametrize(
    ("options", "has_table", "on_gpu", "on_cpu"),
    [
        ({}, True, True, False),
        ({"ctas": 4, "tune_seconds": 9}, True, True, False),
        ({"min_tokens": 64}, False, False, False),
        ({"decode_min_tokens": 2}, False, False, False),
        ({"tune": "off"}, False, False, False),
        ({"tune": "off", "table": "t.yaml"}, True, False, False),
        ({"table": "t.yaml"}, True, True, False),
        ({"tune": "force", "min_tokens": 64}, True, True, True),
    ],
)
def test_who_says_what_is_woven(options, has_table, on_gpu, on_cpu):
    config = TokenWeaveConfig(enabled=True, **options)
    assert config.has_table is has_table
    assert config.measures(on_cpu=False) is on_gpu
    assert config.measures(on_cpu=True) is on_cpu
