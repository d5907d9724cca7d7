"""The one configuration of the extension: a frozen dataclass, carried by one environment variable.

SGLang spawns its workers and they inherit the environment, so that is where flags and keyword
arguments end up; every process reads them back here and nowhere else.
"""

import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

ENVIRONMENT_VARIABLE = "SGLANG_TOKENWEAVE"
TRANSPORTS = ("auto", "reference", "peer", "multicast")
TUNE = ("off", "auto", "force")
THRESHOLDS = ("min_tokens", "fuse_min_tokens", "decode_min_tokens")
CHOICES = {"transport": TRANSPORTS, "tune": TUNE}


class ConfigError(ValueError):
    """An option is unknown, out of range, or contradicts another one."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TokenWeaveConfig:
    """How this server weaves.

    Raises:
        ConfigError: naming the option, what came and what is allowed.
    """

    enabled: bool = _option(False, "switch TokenWeave on")
    strict: bool = _option(False, "stop with an error if anything asked for cannot be active")
    transport: str = _option(
        "auto",
        "who moves the bytes: 'reference' is torch.distributed, 'peer' and 'multicast' the fused "
        "kernel over NVLink; 'auto' the best there is",
    )
    min_tokens: int = _option(1024, "smallest prefill batch, in tokens, that is woven")
    fuse_min_tokens: int = _option(
        0, "smallest batch that runs unsplit through the fused op (0: never)"
    )
    decode_min_tokens: int = _option(
        0, "smallest decode batch, in requests, that is woven (0: never)"
    )
    ctas: int = _option(
        8,
        "CTAs of the communication op beside a computation, an even number; 0: none, the copy "
        "engines move the bytes",
    )
    fuse_ctas: int = _option(16, "CTAs of the op when nothing runs beside it; an even number")
    tune: str = _option(
        "auto",
        "who says from which size to weave: 'off' the thresholds; 'auto' they too, where one is "
        "given, else a table that was measured, on GPUs now if there is none; 'force' a new table",
    )
    tune_seconds: int = _option(90, "longest that a measurement at start may take")
    table: str = _option(
        "", "file of a tuned table to use instead of the kept one; with force, to write"
    )
    align_chunks: bool = _option(
        False, "shrink prefill chunks to totals without a broken GEMM wave"
    )
    check_plans: bool = _option(
        False, "compare every batch's plan over the ranks before it runs; for debugging"
    )
    log_interval: int = _option(100, "batches between two lines in the log (0: none)")

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            wanted = type(option.default)
            if type(value) is not wanted:
                raise ConfigError(
                    f"{describe(option.name)} is {value!r}; it must be of type {wanted.__name__}"
                )
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{describe(name)} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        if self.ctas == 0 and self.transport != "peer":
            raise ConfigError(
                f"{describe('ctas')} is 0 and {describe('transport')} is {self.transport!r}; the "
                "copy engines serve the transport peer only"
            )
        self._check_at_least("min_tokens", 2)
        self._check_at_least("tune_seconds", 1)
        for name in ("fuse_min_tokens", "decode_min_tokens", "log_interval"):
            self._check_at_least(name, 0)
        if self.decode_min_tokens == 1:
            raise ConfigError(f"{describe('decode_min_tokens')} is 1; one request cannot be split")
        self._check_at_least("ctas", 0)
        self._check_at_least("fuse_ctas", 2)
        for name in ("ctas", "fuse_ctas"):
            if getattr(self, name) % 2:
                raise ConfigError(
                    f"{describe(name)} is {getattr(self, name)}; it must be even, "
                    "because CTAs are launched as clusters of two"
                )
        if self.fuse_min_tokens >= self.min_tokens:
            raise ConfigError(
                f"{describe('fuse_min_tokens')} is {self.fuse_min_tokens} and "
                f"{describe('min_tokens')} is {self.min_tokens}: no batch would be left for the "
                "fused op; make the first smaller than the second"
            )

    @property
    def has_table(self) -> bool:
        """Whether a table decides what is woven, if there is one; else the thresholds do."""
        return bool(self.table) or self.tune == "force" or self._wants_table

    def measures(self, *, on_cpu: bool) -> bool:
        """Return whether a table is measured where there is none: a CPU's times mean nothing."""
        return self.tune == "force" or (self._wants_table and not on_cpu)

    @property
    def _wants_table(self) -> bool:
        defaults = {option.name: option.default for option in fields(self)}
        is_given = any(getattr(self, name) != defaults[name] for name in THRESHOLDS)
        return self.tune == "auto" and not is_given

    def _check_at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ConfigError(
                f"{describe(name)} is {getattr(self, name)}; it must be at least {least}"
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build a configuration from option names and values; refuse unknown names."""
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown TokenWeave option {name!r}; known: {', '.join(known)}")
        return cls(**options)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read the configuration that the parent process exported.

        Raises:
            ConfigError: also when options are set while TokenWeave is not switched on.
        """
        options = _read(environment)
        config = cls.from_mapping(options)
        idle = [describe(name) for name in options if name != "enabled"]
        if idle and not config.enabled:
            raise ConfigError(
                f"{', '.join(idle)} given, but TokenWeave is off: add {describe('enabled')}"
            )
        return config

    def as_dict(self) -> dict[str, Any]:
        """Return the options by name, for reports."""
        return asdict(self)


def flag(name: str) -> str:
    """Return the command-line flag of an option."""
    return "--enable-tokenweave" if name == "enabled" else "--tokenweave-" + name.replace("_", "-")


def describe(name: str) -> str:
    """Name an option so that both a shell and a Python user find it."""
    return f"{flag(name)} ({name})"


def export(options: Mapping[str, Any], environment: MutableMapping[str, str] = os.environ) -> None:
    """Merge options into the environment that the worker processes inherit."""
    merged = {**_read(environment), **options}
    environment[ENVIRONMENT_VARIABLE] = json.dumps(merged, sort_keys=True)


def _read(environment: Mapping[str, str]) -> dict[str, Any]:
    text = environment.get(ENVIRONMENT_VARIABLE, "") or "{}"
    shown = repr(text[:200])
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:  # of the syntax, 4300 digits, nesting
        raise ConfigError(
            f"environment variable {ENVIRONMENT_VARIABLE} is not JSON ({error}): {shown}; "
            'expected an object such as {"enabled": true, "min_tokens": 512}'
        ) from error
    if not isinstance(options, dict):
        raise ConfigError(
            f"environment variable {ENVIRONMENT_VARIABLE} holds {shown}; expected a JSON object"
        )
    return options
