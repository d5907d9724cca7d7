"""Rules that keep the sources safe: nothing is unpickled, no shell is given a text, pins are pins.

What is found here is what docs/security.md promises.
"""

import ast
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted(ROOT.glob("sglang_tokenweave/**/*.py"))
PROGRAMS = sorted(ROOT.glob("launch/**/*.py")) + sorted(ROOT.glob("patches/*.py"))
# Modules whose readers run what they read.
UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
LOADERS = {"torch.load", "numpy.load", "np.load", "eval", "exec", "pandas.read_pickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
# Where torch.distributed or multiprocessing pickle: among the processes of one program only.
PICKLING = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "Pipe", "Queue", "SimpleQueue"),
}
PICKLES_AMONG_RANKS = {
    "sglang_tokenweave/agreement.py",
    "sglang_tokenweave/doctor/ranks.py",
    "sglang_tokenweave/doctor/selftest_rank.py",
}

Find = Callable[[ast.Module], Iterator[str]]


def found(find: Find, files: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT).as_posix()}: {what}"
        for path in files
        for what in find(ast.parse(path.read_text()))
    ]


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call with its dotted name, as imported: `from os import system` is os.system."""
    origins = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                origins[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    origins[alias.asname] = alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            yield ".".join([origins.get(first, first), *rest]), node


def unpickling(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        yield from (f"import {name}" for name in modules if name.split(".")[0] in UNPICKLERS)
    for name, call in calls(tree):
        texts = [each.value for each in call.args if isinstance(each, ast.Constant)]
        if name.endswith(("import_module", "__import__")) and UNPICKLERS & set(texts):
            yield ast.unparse(call)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in LOADERS and options.get("weights_only") != "True":
            yield ast.unparse(call)


def pickling_among_ranks(tree: ast.Module) -> Iterator[str]:
    for name, call in calls(tree):
        if name.rpartition(".")[2] in PICKLING:
            yield ast.unparse(call)


def shells(tree: ast.Module) -> Iterator[str]:
    for name, call in calls(tree):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        spawns_shell = name.startswith("subprocess.") and options.get("shell", "False") != "False"
        hides_options = name.startswith("subprocess.") and None in options  # **options
        one_text = name.startswith("subprocess.") and call.args and is_text(call.args[0])
        if name in SHELLS or spawns_shell or hides_options or one_text:
            yield ast.unparse(call)
        words = [each.value for each in ast.walk(call) if isinstance(each, ast.Constant)]
        if name.startswith("subprocess.") and "-c" in words and {"sh", "bash"} & set(words):
            yield ast.unparse(call)


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_the_package_never_unpickles() -> None:
    assert len(PACKAGE) > 50
    assert found(unpickling, PACKAGE) == []


def test_programs_unpickle_weights_only() -> None:
    assert found(unpickling, PROGRAMS) == []


def test_only_ranks_pickle_for_each_other() -> None:
    places = {line.partition(":")[0] for line in found(pickling_among_ranks, PACKAGE)}
    assert places == PICKLES_AMONG_RANKS


def test_no_shell_is_given_a_text() -> None:
    assert found(shells, PACKAGE + PROGRAMS) == []


@pytest.mark.parametrize(
    ("find", "source"),
    [
        (unpickling, "import pickle"),
        (unpickling, "import os, marshal as m"),
        (unpickling, "def f():\n    from shelve import open"),
        (unpickling, "import importlib\nimportlib.import_module('_pickle')"),
        (unpickling, "import torch\ntorch.load(path)"),
        (unpickling, "from torch import load as get\nget(path, weights_only=False)"),
        (unpickling, "eval(text)"),
        (pickling_among_ranks, "dist.broadcast_object_list(values)"),
        (shells, "import os\nos.system(text)"),
        (shells, "from os import popen as p\np(text)"),
        (shells, "import subprocess\nsubprocess.run(words, shell=True)"),
        (shells, "import subprocess as s\ns.Popen(words, shell=is_shell)"),
        (shells, "from subprocess import run\nrun(f'ls {name}')"),
        (shells, "import subprocess\nsubprocess.run(words, **options)"),
        (shells, "import subprocess\nsubprocess.run(['bash', '-c', text])"),
    ],
)
def test_what_is_forbidden_would_be_seen(find: Find, source: str) -> None:
    assert list(find(ast.parse(source)))


def test_what_is_allowed_is_not_seen() -> None:
    source = "import json, subprocess, torch\njson.loads(t)\ntorch.load(p, weights_only=True)\n"
    source += "subprocess.run(['git', 'log'], check=True)\nmodel.load(p)\n"
    for find in (unpickling, shells, pickling_among_ranks):
        assert list(find(ast.parse(source))) == []


# --- dependencies


def test_every_pin_is_exact() -> None:
    lines = (ROOT / "launch" / "cpu" / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len(pins) > 100
    loose = [
        str(pin)
        for pin in pins
        if pin.url or [each.operator for each in pin.specifier] != ["=="] or "*" in str(pin)
    ]
    assert loose == []


def test_every_range_has_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    texts = [*project["build-system"]["requires"], *(text for e in extras.values() for text in e)]
    requirements = [Requirement(text) for text in texts]
    open_ended = [
        str(requirement)
        for requirement in requirements
        if requirement.name != "sglang-tokenweave"
        and not {each.operator for each in requirement.specifier} & {"<", "<=", "==", "~="}
    ]
    assert open_ended == []
