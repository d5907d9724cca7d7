"""The Python standard library's sources: text that every machine has, in two parts that never mix.

The demo model learns from one part; the other is held out, for prompts and to measure the model.
Which part a module is in depends on its name alone, so every Python release divides alike.
"""

import hashlib
import sys
import sysconfig
from pathlib import Path

# Tables and generated text, which would teach little; tests; and what distributions leave out.
_EXCLUDED = {"encodings", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo", "turtle"}
_HELD_OUT_OF_16 = 1


def module_files(*, held_out: bool) -> list[Path]:
    """Return the source files of one part, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [root / name for name in names if _belongs(name) and is_held_out(name) == held_out]


def is_held_out(name: str) -> bool:
    """Say whether the module with this path, as in `json/decoder.py`, is kept from training."""
    return hashlib.sha256(name.encode()).digest()[0] % 16 < _HELD_OUT_OF_16


def _belongs(name: str) -> bool:
    top, *rest = name.removesuffix(".py").split("/")
    is_library = top in sys.stdlib_module_names and not top.startswith("_sysconfigdata")
    return is_library and top not in _EXCLUDED and not {"test", "tests"} & set(rest)
