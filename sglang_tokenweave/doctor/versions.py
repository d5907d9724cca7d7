"""Judge the installed packages, SGLang's seams, and what this release can do."""

from collections.abc import Iterator

from sglang_tokenweave.doctor.facts import Facts, Failure
from sglang_tokenweave.doctor.findings import Finding, finding

SGLANG = ((0, 5, 17), (0, 5, 23))  # oldest and newest that is supported
PYTHON = ((3, 11), (3, 12))
CUDA_BINDINGS_MAJOR = 13


def judge(facts: Facts) -> Iterator[Finding]:
    """Yield the findings on software."""
    yield from _versions(facts)
    yield from _packages(facts)
    yield from _seams(facts)


def _versions(facts: Facts) -> Iterator[Finding]:
    packages = facts.packages
    installed = [f"{name} {number}" for name, number in packages.versions.items() if number]
    built_for = f" (torch for CUDA {packages.torch_cuda})" if packages.torch_cuda else ""
    python = ".".join(map(str, packages.python))
    parts = [f"sglang-tokenweave {facts.version}", f"Python {python}", *installed]
    yield finding("versions", ", ".join(parts) + built_for)


def _packages(facts: Facts) -> Iterator[Finding]:
    packages = facts.packages
    if not PYTHON[0] <= packages.python <= PYTHON[1]:
        yield finding("python-untested", f"Python {packages.python[0]}.{packages.python[1]}")
    if packages.versions["torch"] is None:
        yield finding("torch-missing", "torch is not installed")
    elif facts.gpus and packages.torch_cuda is None:
        text = f"torch {packages.versions['torch']} is built without CUDA"
        yield finding("torch-without-cuda", text)
    bindings = packages.versions["cuda-bindings"]
    if bindings and parse(bindings)[0] != CUDA_BINDINGS_MAJOR:
        yield finding("cuda-python-untested", f"cuda-bindings is {bindings}; 13 is supported")
    if packages.plugin_problem:
        yield finding("plugin-not-loaded", packages.plugin_problem)
    if packages.config_problem:
        yield finding("options-invalid", packages.config_problem)


def _seams(facts: Facts) -> Iterator[Finding]:
    installed = facts.packages.versions["sglang"]
    if installed is None:
        yield finding("sglang-missing", "SGLang is not installed")
        return
    if not SGLANG[0] <= parse(installed)[:3] <= SGLANG[1]:
        yield finding("sglang-untested", f"SGLang {installed} was never tried with this release")
    if isinstance(facts.sglang, Failure):
        yield finding("sglang-broken", f"SGLang cannot be imported: {facts.sglang.text}")
    elif facts.sglang.missing:
        yield finding("seams-missing", "; ".join(facts.sglang.missing))
    else:
        yield finding("seams", f"all {facts.sglang.num_hooks} hooks take, no seam is missing")
    if not isinstance(facts.sglang, Failure) and facts.sglang.partial:
        yield finding("seams-partial", "; ".join(facts.sglang.partial))


def parse(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: `13.0.3+cpu` is (13, 0, 3)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers) or (0,)
