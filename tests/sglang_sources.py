"""Definitions in the sources of an SGLang release whose modules need a GPU's kernels to import."""

import __future__

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server import overlay


def folder(version: str) -> Path:
    """Return the folder that holds the package `sglang` of a release."""
    paths = overlay(version) or [str(Path(find_spec("sglang").origin).parents[1])]
    return Path(paths[0])


@cache
def statements(version: str, path: str) -> tuple[ast.stmt, ...]:
    """Return what a file of a release says."""
    return tuple(ast.parse((folder(version) / path).read_text()).body)


def named(body: Sequence[ast.stmt], name: str) -> Any:
    """Return the one class or function of a name."""
    (found,) = [node for node in body if getattr(node, "name", None) == name]
    return found


def run(definition: Any, **names: Any) -> Any:
    """Return what a definition defines; its annotations stay text."""
    names |= {"dataclass": dataclass, "__name__": __name__}
    flag = __future__.annotations.compiler_flag
    exec(compile(ast.Module([definition], []), "sglang", "exec", flag), names)
    return names[definition.name]
