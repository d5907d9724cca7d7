"""Read YAML with the line and the field of everything that is wrong with it.

Only the syntax tree that PyYAML composes is read, never a constructor: no scalar is guessed at
(`off` is a word here, not a falsehood), nothing is built that the reader did not ask for. Anchors,
aliases, tags and deep nesting are refused before a tree is made of them.
"""

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
M = TypeVar("M", bound=StrEnum)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it
_DEEPEST = 6
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,8})")
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,9})(\.[0-9]{1,6})?")


class TableError(ValueError):
    """A text is no tuned table; the error names the line and the field."""


class Node:
    """A piece of the text, the line that it begins on, and the field that it is the value of."""

    def __init__(self, node: yaml.Node, path: str) -> None:
        self._node = node
        self._path = path

    def error(self, problem: str) -> TableError:
        """Return an error about this piece."""
        line = self._node.start_mark.line + 1
        return TableError(f"line {line}, field {self._path or 'of the table'}: {problem}")

    def mapping(self, needed: Iterable[str], optional: Iterable[str] = ()) -> dict[str, "Node"]:
        """Return the values by field name; every needed field is there, and no unknown one."""
        if not isinstance(self._node, yaml.MappingNode):
            raise self.error(f"got {self._shown()}; expected fields: {', '.join(needed)}")
        known = [*needed, *optional]
        found: dict[str, Node] = {}
        for key, value in self._node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "(not a word)"
            part = Node(value, f"{self._path}.{name}".lstrip("."))
            if name not in known:
                raise Node(key, part._path[:200]).error(f"unknown; expected {', '.join(known)}")
            if name in found:
                raise Node(key, part._path).error("given twice; remove one")
            found[name] = part
        for name in needed:
            if name not in found:
                raise self.error(f"{name} is missing")
        return found

    def sequence(self) -> list["Node"]:
        """Return the entries of a list."""
        if not isinstance(self._node, yaml.SequenceNode):
            raise self.error(f"got {self._shown()}; expected a list")
        return [Node(each, f"{self._path}[{i}]") for i, each in enumerate(self._node.value)]

    def word(self) -> str:
        """Return a scalar's text as it stands, quoted or not."""
        if not isinstance(self._node, yaml.ScalarNode):
            raise self.error(f"got {self._shown()}; expected one value")
        return str(self._node.value)

    def member(self, members: type[M]) -> M:
        """Return the member of an enumeration that a word names."""
        word = self.word()
        if word not in [*members]:
            raise self.error(f"got {word[:40]!r}; expected one of {', '.join(members)}")
        return members(word)

    def integer(self) -> int:
        """Return a whole number of at most nine digits."""
        return int(self._match(_INTEGER, "a whole number"))

    def number(self) -> float:
        """Return a number of 0 or more, in plain decimals."""
        return float(self._match(_NUMBER, "a number of 0 or more, in decimals"))

    def build(self, cls: type[T], values: Mapping[str, Any], parts: Mapping[str, "Node"]) -> T:
        """Call `cls(**values)`; what it refuses by a field's name is an error on that field."""
        try:
            return cls(**values)
        except TableError:
            raise
        except ValueError as error:
            name, _, problem = str(error).partition(": ")
            raise (
                parts[name].error(problem) if name in parts else self.error(str(error))
            ) from error

    def _match(self, pattern: re.Pattern[str], expected: str) -> str:
        word = self.word()
        # A quoted number is a text: whoever wrote it so may have meant something else.
        if self._node.style or not pattern.fullmatch(word):
            raise self.error(f"got {word[:40]!r}; expected {expected}")
        return word

    def _shown(self) -> str:
        if isinstance(self._node, yaml.ScalarNode):
            return repr(self._node.value[:40])
        return "a list" if isinstance(self._node, yaml.SequenceNode) else "fields"


def compose(text: str) -> Node:
    """Return the root of a text.

    Raises:
        TableError: the text is empty or no YAML, or has what a table never needs.
    """
    try:
        _check_events(text)
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise TableError(f"line {line}: the text is not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise TableError(f"line {line}: the text is not YAML: {error}") from error
    if root is None:
        raise TableError("line 1: the text is empty; expected a tuned table")
    return Node(root, "")


def _check_events(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None):
            raise TableError(f"line {line}: anchors and aliases are not allowed; write values out")
        if getattr(event, "tag", None):
            raise TableError(f"line {line}: tag {event.tag[:40]} is not allowed; remove it")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise TableError(f"line {line}: nested too deeply; a table has four levels")
