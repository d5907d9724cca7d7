"""What a container can be told: each variable reaches the server, and a wrong one is refused."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

from launch.docker import knobs
from sglang_tokenweave.config import TokenWeaveConfig, flag

ROOT = Path(__file__).resolve().parents[1]


def other_value(option) -> str:
    """Return an allowed value other than the default."""
    if option.type is bool:
        return "1"
    if option.type is int:
        return str(option.default + 2)
    others = {"transport": "reference", "tune": "off", "table": "/t.yaml"}
    return others[option.name]


def command(arguments: tuple[str, ...] = (), **environment: str) -> list[str]:
    settings = knobs.read({"MODEL": "m", **environment}, arguments)
    return knobs.server_command(settings, settings.tp_size or 8)


def test_every_option_is_a_variable_and_reaches_the_server():
    for option in fields(TokenWeaveConfig):
        value = other_value(option)
        given = command(**{knobs.variable(option.name): value})
        if option.name == "enabled":
            assert given == command()
        elif option.type is bool:
            assert given == [*command(), flag(option.name)]
        else:
            assert given == [*command(), flag(option.name), value]


def test_model_address_and_ranks_reach_the_server():
    assert command(TP="2", HOST="::", PORT="31000") == [
        *(sys.executable, "-m", "sglang_tokenweave.launch_server", "--model-path", "m"),
        *("--host", "::", "--port", "31000", "--tp", "2"),
    ]


def test_switched_off_the_server_is_stock():
    given = command(TOKENWEAVE_ENABLED="0")
    assert given[1:3] == ["-m", "sglang.launch_server"]
    assert not any("tokenweave" in word for word in given)


def test_a_cpu_gets_its_flags_and_a_threshold_that_its_chunks_reach():
    given = command(DEVICE="cpu")
    assert given[given.index("--device") + 1] == "cpu"
    assert given[-2:] == ["--tokenweave-min-tokens", "64"]
    assert command(DEVICE="cpu", TOKENWEAVE_MIN_TOKENS="9")[-1] == "9"
    assert "--tokenweave-min-tokens" not in command(DEVICE="cpu", TOKENWEAVE_ENABLED="0")


def test_extra_arguments_are_split_without_a_shell():
    extra = "--json-model-override-args '{\"a\": 1}' --name $(touch x);`y`"
    assert command(("--last",), EXTRA_ARGS=extra) == [
        *command(),
        *("--json-model-override-args", '{"a": 1}', "--name", "$(touch", "x);`y`", "--last"),
    ]


def test_an_empty_variable_is_not_set():
    empty = {knob.name: "" for knob in knobs.table() if knob.name != "MODEL"}
    assert command(**empty) == command()


@pytest.mark.parametrize(
    ("environment", "arguments", "words"),
    [
        ({"MODEL": ""}, (), ["MODEL is not set"]),
        ({"TOKENWEAVE_MIN_TOKEN": "9"}, (), ["TOKENWEAVE_MIN_TOKEN;", "TOKENWEAVE_MIN_TOKENS?"]),
        ({"TOKENWEAVE_PORT": "9"}, (), ["unknown variable TOKENWEAVE_PORT", "TOKENWEAVE_CTAS"]),
        ({"TOKENWEAVE_STRICT": "yes"}, (), ["TOKENWEAVE_STRICT", "'yes'", "1, true, 0, false"]),
        ({"TOKENWEAVE_MIN_TOKENS": "-1"}, (), ["TOKENWEAVE_MIN_TOKENS", "'-1'", "whole number"]),
        ({"TOKENWEAVE_CTAS": "3"}, (), ["--tokenweave-ctas", "even", "TOKENWEAVE_CTAS"]),
        ({"TOKENWEAVE_TRANSPORT": "pigeon"}, (), ["'pigeon'", "reference"]),
        ({"TOKENWEAVE_ENABLED": "0", "TOKENWEAVE_CTAS": "4"}, (), ["TOKENWEAVE_CTAS", "is 0"]),
        ({"TP": "two"}, (), ["TP", "'two'", "from 1"]),
        ({"TP": "0"}, (), ["TP", "'0'", "from 1"]),
        ({"PORT": "70000"}, (), ["PORT", "'70000'", "65535"]),
        ({"DEVICE": "tpu"}, (), ["DEVICE", "'tpu'", "cuda, cpu"]),
        ({"STOP_SECONDS": "0.5"}, (), ["STOP_SECONDS", "'0.5'"]),
        ({"EXTRA_ARGS": "--a 'b"}, (), ["EXTRA_ARGS", "No closing quotation"]),
        ({"EXTRA_ARGS": "--port=1"}, (), ["--port=1", "PORT"]),
        ({}, ("--tp", "4"), ["--tp", "TP"]),
        ({}, ("bash",), ["'bash'", "--entrypoint bash"]),
    ],
)
def test_a_wrong_setting_is_refused_by_name(environment, arguments, words):
    with pytest.raises(knobs.KnobError) as refused:
        command(arguments, **environment)
    assert [word for word in words if word not in str(refused.value)] == []


def test_the_documents_show_the_table_as_it_is():
    assert knobs.markdown() in (ROOT / "docs" / "docker.md").read_text()
