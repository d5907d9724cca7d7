"""Our command-line flags, added to SGLang's own parser."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from sglang_tokenweave import refusals
from sglang_tokenweave.config import CHOICES, ConfigError, TokenWeaveConfig, export, flag
from sglang_tokenweave.tuning import given


class _Export(argparse.Action):
    """Put a parsed option where the worker processes find it: into the environment."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            export({self.dest.removeprefix("tokenweave_"): True if self.nargs == 0 else values})
        except ConfigError as error:
            parser.error(str(error))


def add_arguments(result: None, parser: argparse.ArgumentParser) -> None:
    """Add our group of flags (AFTER hook on `ServerArgs.add_cli_args`)."""
    group = parser.add_argument_group("TokenWeave", "hide tensor-parallel communication")
    for option in fields(TokenWeaveConfig):
        shape: dict[str, Any] = {"nargs": 0} if option.type is bool else {"type": option.type}
        if option.name in CHOICES:
            shape["choices"] = CHOICES[option.name]
        shown = "" if option.type is bool else f" (default: {option.default})"
        group.add_argument(
            flag(option.name),
            action=_Export,
            dest=f"tokenweave_{option.name}",
            default=argparse.SUPPRESS,  # SGLang's namespace holds only what is SGLang's
            help=option.metadata["help"] + shown,
            **shape,
        )


def check_arguments(result: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse contradictory flags before anything starts (AFTER hook on `from_cli_args`).

    Here and not at load is also where `result`, SGLang's arguments, must be checked for what keeps
    us out of the workers.
    """
    config = read_or_exit()
    _check_table(config)
    reason = refusals.launch_reason(result) if config.enabled else None
    if reason and config.strict:
        _exit(f"TokenWeave is strict and cannot be active: {reason}")
    if reason:
        _say(f"TokenWeave is NOT active, the server runs stock: {reason}")


def _check_table(config: TokenWeaveConfig) -> None:
    try:
        given.check(config)
    except ValueError as error:
        _exit(str(error))


def read_or_exit() -> TokenWeaveConfig:
    """Read the configuration; print what is wrong with it and leave with status 2 otherwise.

    SystemExit, because SGLang logs and swallows every other exception of a plugin.
    """
    try:
        return TokenWeaveConfig.from_environment()
    except ConfigError as error:
        _exit(str(error))


def _exit(problem: str) -> NoReturn:
    _say(f"error: {problem}")
    raise SystemExit(2)


def _say(text: str) -> None:
    print(f"sglang_tokenweave: {text}", file=sys.stderr)  # noqa: T201 - like argparse
