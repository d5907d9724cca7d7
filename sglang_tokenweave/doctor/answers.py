"""A probe's answer as text: JSON carries values, and nothing that could run."""

import json
from dataclasses import asdict, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from sglang_tokenweave.doctor.facts import Cuda, Failure, Nvml, Nvrtc, Sglang

_KINDS = {kind.__name__: kind for kind in (Cuda, Failure, Nvml, Nvrtc, Sglang)}


def to_text(answer: Any) -> str:
    """Return the text of an answer: one of the facts that probes gather, or a `Failure`."""
    return json.dumps({type(answer).__name__: asdict(answer)})


def from_text(text: bytes) -> Any:
    """Read what `to_text` wrote.

    Raises:
        ValueError: the text is no answer.
    """
    try:
        [(name, fields)] = json.loads(text).items()
        return _build(_KINDS[name], fields)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"no answer of a probe: {text[:80]!r}") from error


def _build(kind: Any, value: Any) -> Any:
    """Give a value read from JSON, which knows lists and objects only, the type of its field."""
    if is_dataclass(kind):
        types = get_type_hints(kind)
        return kind(**{name: _build(types[name], item) for name, item in value.items()})  # type: ignore[operator] # mypy cannot tell a class from its instance
    if get_origin(kind) is tuple:
        element, *_ = get_args(kind)  # the elements of our tuples are of one type
        return tuple(_build(element, item) for item in value)
    return value
