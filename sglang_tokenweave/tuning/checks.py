"""Refuse values out of range, naming the field, what came and what is allowed."""

from typing import Any

_LONGEST_US = 1e9


def name(field: str, value: Any) -> None:
    """Check a text that stands in a file and in logs."""
    if type(value) is not str or not 0 < len(value) <= 200 or not _is_plain(value):
        raise ValueError(f"{field}: got {value!r}; expected 1 to 200 printable ASCII characters")


def integer(field: str, value: Any, least: int, most: int) -> None:
    """Check a whole number."""
    if type(value) is not int or not least <= value <= most:
        allowed = str(least) if least == most else f"an integer from {least} to {most}"
        raise ValueError(f"{field}: got {value!r}; expected {allowed}")


def time(field: str, value: Any) -> None:
    """Check a time in microseconds."""
    if type(value) is not float or not 0 <= value <= _LONGEST_US:  # NaN compares false
        raise ValueError(f"{field}: got {value!r}; expected microseconds from 0 to {_LONGEST_US:g}")


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()
