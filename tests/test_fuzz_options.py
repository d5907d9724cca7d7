"""Arbitrary options, by every way they come in: a clear error that names the option, or a run."""

import argparse
import json
import string
from dataclasses import fields
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch.docker import knobs
from sglang_tokenweave import flags
from sglang_tokenweave.config import (
    CHOICES,
    ENVIRONMENT_VARIABLE,
    ConfigError,
    TokenWeaveConfig,
    export,
    flag,
)

fuzz = settings(deadline=None, derandomize=True, max_examples=300)
OPTIONS = {option.name: option for option in fields(TokenWeaveConfig)}
TOO_MANY_DIGITS = "9" * 4301  # one more than Python reads
TOO_DEEP = "[" * 5000

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
near = st.integers(-2, 40) | st.sampled_from([word for words in CHOICES.values() for word in words])
names = st.sampled_from([*OPTIONS]) | st.text(max_size=12)
# What the kernel accepts in an environment: no NUL; what is no UTF-8 comes as surrogates.
characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
words = st.text(st.one_of(characters, st.sampled_from("\udc80\udcff")), max_size=20)


def valid_values(option):
    """Return what an option takes when looked at alone."""
    if option.name in CHOICES:
        return st.sampled_from(CHOICES[option.name])
    return st.booleans() if option.type is bool else st.integers(0, 5000)


def configured(read, options):
    """Return the configuration, or None if it was refused with a text that names an option."""
    config, refusal = result_or_refusal(read, ConfigError)
    if refusal:
        named = [name for name in options if repr(name) in refusal or flag(name) in refusal]
        assert named or ENVIRONMENT_VARIABLE in refusal
        assert len(refusal) < 1000
    return config


def result_or_refusal(read, error_type):
    """Return what `read` returns and an empty text, or None and the text of its error."""
    try:
        return read(), ""
    except error_type as error:
        return None, str(error)


@given(st.dictionaries(names, junk | near, max_size=4))
@fuzz
def test_options_from_python(options):
    config = configured(partial(TokenWeaveConfig.from_mapping, options), options)
    if config:
        assert {name: config.as_dict()[name] for name in options} == options


@given(st.fixed_dictionaries({}, optional={n: valid_values(o) for n, o in OPTIONS.items()}))
@fuzz
def test_options_each_of_which_is_good(options):
    config = configured(partial(TokenWeaveConfig.from_mapping, options), options)
    if config:
        assert config.fuse_min_tokens < config.min_tokens
        assert config.ctas % 2 == config.fuse_ctas % 2 == 0
        again = {}
        export({**config.as_dict(), "enabled": True}, again)
        assert TokenWeaveConfig.from_environment(again).as_dict() == {
            **config.as_dict(),
            "enabled": True,
        }


@given(words | st.dictionaries(names, junk | near, max_size=3).map(json.dumps))
@example(f'{{"min_tokens": {TOO_MANY_DIGITS}}}')
@example(TOO_DEEP)
@example('{"a":' * 5000)
@fuzz
def test_the_environment_variable(text):
    environment = {ENVIRONMENT_VARIABLE: text}
    try:
        options = json.loads(text or "{}")
    except (ValueError, RecursionError):
        options = None
    named = options if isinstance(options, dict) else {}
    config = configured(partial(TokenWeaveConfig.from_environment, environment), named)
    if config:
        assert isinstance(options, dict)
        assert config == TokenWeaveConfig(**options)
    elif not isinstance(options, dict):
        with pytest.raises(ConfigError, match=ENVIRONMENT_VARIABLE):
            export({"enabled": True}, environment)


own_flags = st.sampled_from([flag(name) for name in OPTIONS])
printable = st.text(string.printable, max_size=8)


@given(st.lists(own_flags | near.map(str) | printable | junk.map(str), max_size=6))
@example(["--tokenweave-min-tokens", TOO_MANY_DIGITS])
@example(["--tokenweave-transport", "\udc80"])
@fuzz
def test_the_command_line(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, "{}")
        parser = argparse.ArgumentParser()
        flags.add_arguments(None, parser)
        try:
            known, _ = parser.parse_known_args(arguments)
            flags.check_arguments(argparse.Namespace())
        except SystemExit as stop:
            code = stop.code
        else:
            code = None
            assert vars(known) == {}
            TokenWeaveConfig.from_environment()
    assert code in (None, 0, 2)  # 2: bad flags. 0: --help.


knob_names = st.sampled_from([knob.name for knob in knobs.table()])
strange_names = st.text(string.ascii_uppercase, max_size=6).map(knobs.PREFIX.__add__)
knob_values = words | near.map(str) | st.sampled_from(["0", "1", "cpu", "cuda", "peer", "-x 'y"])


@given(
    st.dictionaries(knob_names | strange_names, knob_values, max_size=4),
    st.lists(words | own_flags, max_size=3),
)
@example({"PORT": TOO_MANY_DIGITS}, [])
@example({"TOKENWEAVE_MIN_TOKENS": TOO_MANY_DIGITS}, [])
@example({"EXTRA_ARGS": '"'}, [])
@fuzz
def test_a_containers_variables(environment, arguments):
    given_ = {"MODEL": "m", **environment}
    read, refusal = result_or_refusal(partial(knobs.read, given_, arguments), knobs.KnobError)
    if read is None:
        culprits = [*environment, *arguments]
        assert any(name in refusal or repr(name) in refusal for name in culprits)
        return
    command = knobs.server_command(read, read.tp_size or 2)
    assert all(isinstance(word, str) and "\0" not in word for word in command)
    assert command[-len(arguments) :] == arguments or not arguments
    ours = {name: value for name, value in read.weave.items() if name != "enabled"}
    assert all(flag(name) in command for name, value in ours.items() if value is not False)
