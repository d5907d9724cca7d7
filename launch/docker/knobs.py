"""What a container can be told: environment variables, checked, and the command they become."""

import difflib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from launch.command import OWN_FLAGS
from sglang_tokenweave import cpu
from sglang_tokenweave.config import ConfigError, TokenWeaveConfig, flag

DEVICES = ("cuda", "cpu")
PREFIX = "TOKENWEAVE_"
# A prefill chunk on a CPU is 512 tokens: the default threshold would never be reached.
CPU_MIN_TOKENS = 64
_MAX_DIGITS = 20  # of any number here; int() itself raises from 4301 digits on
_SWITCH = {"1": True, "true": True, "0": False, "false": False}


class KnobError(ValueError):
    """A variable or an argument cannot be; the text says what came and what is allowed."""


@dataclass(frozen=True)
class Knob:
    """An environment variable of the container."""

    name: str
    default: str
    help: str


def table() -> list[Knob]:
    """Return every variable; those of TokenWeave are its options, so none can be forgotten."""
    general = [
        Knob(
            "MODEL", "", "a folder, or a Hugging Face name on a GPU; the CPU image has a small one"
        ),
        Knob("TP", "", "ranks; default: all GPUs that the container sees, 2 on a CPU"),
        Knob("HOST", "0.0.0.0", "address to listen on, inside the container"),
        Knob("PORT", "30000", "port to listen on, inside the container"),
        Knob("DEVICE", "cuda", "`cuda` or `cpu`; each image sets its own"),
        Knob("STOP_SECONDS", "60", "after SIGTERM: seconds for the requests that are running"),
        Knob("EXTRA_ARGS", "", "more SGLang flags, quoted as for a shell; no shell reads them"),
    ]
    options = []
    for option in fields(TokenWeaveConfig):
        # What else is a container of this project for?
        default = True if option.name == "enabled" else option.default
        shown = str(int(default)) if isinstance(default, bool) else str(default)
        switch = " (0 or 1)" if isinstance(default, bool) else ""
        options.append(Knob(variable(option.name), shown, option.metadata["help"] + switch))
    return [*general, *options]


def variable(option: str) -> str:
    """Return the environment variable of a TokenWeave option."""
    return PREFIX + option.upper()


@dataclass(frozen=True)
class Settings:
    """A container's settings as they were given; `tp_size` None: not given."""

    model: str
    tp_size: int | None
    host: str
    port: int
    device: str
    stop_s: int
    weave: Mapping[str, Any]  # the TokenWeave options that were given
    flags: Sequence[str]  # for SGLang, as they stand

    @property
    def enabled(self) -> bool:
        """Whether TokenWeave is switched on."""
        return bool(self.weave.get("enabled", True))


def read(environment: Mapping[str, str], arguments: Sequence[str]) -> Settings:
    """Read and check the settings; an empty variable counts as not set.

    Raises:
        KnobError: naming the variable, what came and what is allowed.
    """
    given = {name: value for name, value in environment.items() if value}
    _refuse_unknown(given)
    get = {knob.name: given.get(knob.name, knob.default) for knob in table()}
    if not get["MODEL"]:
        raise KnobError("MODEL is not set: name a folder with a model, or a Hugging Face name")
    if get["DEVICE"] not in DEVICES:
        raise KnobError(f"DEVICE is {get['DEVICE']!r}; allowed: {', '.join(DEVICES)}")
    return Settings(
        model=get["MODEL"],
        tp_size=_integer("TP", get["TP"], 1, 4096) if get["TP"] else None,
        host=get["HOST"],
        port=_integer("PORT", get["PORT"], 1, 65535),
        device=get["DEVICE"],
        stop_s=_integer("STOP_SECONDS", get["STOP_SECONDS"], 1, 86400),
        weave=_weave(given),
        flags=_flags(get["EXTRA_ARGS"], arguments),
    )


def server_command(settings: Settings, tp_size: int) -> list[str]:
    """Return the server's command; the user's own flags come last, so they win."""
    package = "sglang_tokenweave" if settings.enabled else "sglang"
    command = [sys.executable, "-m", f"{package}.launch_server", "--model-path", settings.model]
    command += ["--host", settings.host, "--port", str(settings.port)]
    weave = {name: value for name, value in settings.weave.items() if name != "enabled"}
    if settings.device == "cpu":
        command += cpu.server_arguments(tp_size)
        if settings.enabled:
            weave = {"min_tokens": CPU_MIN_TOKENS, **weave}
    else:
        command += ["--tp", str(tp_size)]
    for name, value in weave.items():
        if value is True:
            command.append(flag(name))
        elif value is not False:
            command += [flag(name), str(value)]
    return [*command, *settings.flags]


def _refuse_unknown(given: Mapping[str, str]) -> None:
    known = [knob.name for knob in table() if knob.name.startswith(PREFIX)]
    for name in sorted(given):
        if name.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise KnobError(f"unknown variable {name}{hint}; known: {', '.join(known)}")


def _weave(given: Mapping[str, str]) -> dict[str, Any]:
    options = {
        option.name: _value(variable(option.name), given[variable(option.name)], option.type)
        for option in fields(TokenWeaveConfig)
        if variable(option.name) in given
    }
    if options.get("enabled") is False:
        idle = [variable(name) for name in options if name != "enabled"]
        if idle:
            raise KnobError(f"{', '.join(idle)} given, but {variable('enabled')} is 0: drop one")
    try:
        TokenWeaveConfig.from_mapping({"enabled": True, **options})
    except ConfigError as error:
        names = ", ".join(variable(name) for name in options)
        raise KnobError(f"{error} (from {names})") from error
    return options


def _value(name: str, text: str, kind: Any) -> bool | int | str:
    if kind is bool:
        if text.lower() not in _SWITCH:
            raise KnobError(f"{name} is {text!r}; allowed: {', '.join(_SWITCH)}")
        return _SWITCH[text.lower()]
    return _integer(name, text, 0, 2**31 - 1) if kind is int else text


def _integer(name: str, text: str, least: int, most: int) -> int:
    is_number = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
    if not (is_number and least <= int(text) <= most):
        raise KnobError(f"{name} is {text!r}; it must be a whole number from {least} to {most}")
    return int(text)


def _flags(extra: str, arguments: Sequence[str]) -> list[str]:
    try:
        flags = [*shlex.split(extra), *arguments]
    except ValueError as error:
        raise KnobError(f"EXTRA_ARGS is {extra!r}: {error}; quote it as for a shell") from error
    if flags and not flags[0].startswith("-"):
        raise KnobError(
            f"got {flags[0]!r}, but EXTRA_ARGS and what follows the image must be SGLang "
            f"flags; to run another program: docker run --entrypoint {flags[0]} IMAGE"
        )
    for given in flags:
        if given.partition("=")[0] in OWN_FLAGS:
            raise KnobError(
                f"{given} is an SGLang flag that a variable sets: MODEL, TP, HOST or PORT"
            )
    return flags


def markdown() -> str:
    """Return the table for docs/docker.md."""
    rows = [f"| `{knob.name}` | {knob.default or '-'} | {knob.help} |" for knob in table()]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


if __name__ == "__main__":  # python -m launch.docker.knobs
    print(markdown())
