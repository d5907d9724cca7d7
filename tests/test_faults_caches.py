"""Caches on disk that are damaged, old, read-only, full or raced for: warned of, never believed.

A cache is a program that gets something from a folder, or makes it and keeps it there, and prints a
digest of it. What only one of the caches can suffer is tested beside it.
"""

import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from compiling import CHILD, write_sources
from faults import Fault
from racing import race

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cache:
    """How a process uses a cache in the folder `cache` of its working directory."""

    prepare: Callable[[Path], Path]  # makes that working directory
    program: str  # uses the cache, and prints what it got
    another_version: str  # run before the program, makes it one of another version
    refuses: str  # what it says of a folder that it does not use
    rejects: str  # what it says of content that it does not believe
    keeps_nothing: str  # what it says where it cannot write


CACHES = {
    "compiled kernels": Cache(
        prepare=write_sources,
        program=CHILD
        + """
from hashlib import sha256
if sys.argv[1:] == ["wait"]:
    compiler._compiler_identity()
    print("ready", flush=True)
    sys.stdin.readline()
compiled = compile_it(Path("cache"))
print(sha256(compiled.cubin).hexdigest(), compiled.name, compiled.resources)
""",
        another_version="from sglang_tokenweave import compiler\ncompiler._FORMAT = 0\n",
        refuses="compiling without a cache: cache belongs to uid 65534, not 0",
        rejects="is damaged or foreign",
        keeps_nothing="compiled kernels are not kept: cache: ",
    ),
}


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest, fault: Fault) -> Cache:
    fault.where = f"{request.param}{fault.where}"
    return CACHES[request.param]


@pytest.fixture
def folder(cache: Cache, tmp_path: Path) -> Path:
    return cache.prepare(tmp_path)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 3]


def scrambled(content: bytes) -> bytes:
    return random.Random(7).randbytes(len(content))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def on_cache(fault: str, how: str = "") -> pytest.MarkDecorator:
    return pytest.mark.fault(f"a cache {fault}", how)  # `cache` adds which one it is


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(cut, marks=on_cache("is truncated")),
        pytest.param(scrambled, marks=on_cache("is corrupt", ", random bytes")),
        pytest.param(flipped, marks=on_cache("is corrupt", ", one bit")),
    ],
)
def test_damage_is_noticed_and_repaired(
    cache: Cache, folder: Path, fault: Fault, damage: Callable[[bytes], bytes]
) -> None:
    good, said = use(cache, folder)
    assert said == ""
    (entry,) = (folder / "cache").iterdir()
    content = entry.read_bytes()
    entry.write_bytes(damage(content))
    start = time.monotonic()
    again, said = use(cache, folder)
    fault.seconds = time.monotonic() - start
    assert again == good
    assert cache.rejects in said
    assert entry.read_bytes() == content
    assert use(cache, folder) == (good, "")
    fault.sees = f"a warning, `… {cache.rejects}`; it is made anew"
    fault.leaks = strays(folder)


@on_cache("is of another version")
def test_another_version_is_not_believed(cache: Cache, folder: Path, fault: Fault) -> None:
    use(cache, folder, before=cache.another_version)
    old = {path: path.read_bytes() for path in (folder / "cache").iterdir()}
    start = time.monotonic()
    good, said = use(cache, folder)
    fault.seconds = time.monotonic() - start
    assert said == ""
    assert {path: path.read_bytes() for path in old} == old  # the other version goes on with it
    assert use(cache, folder) == (good, "")
    fault.sees = "nothing; it is made anew, beside the other"
    fault.leaks = strays(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
@on_cache("belongs to another user")
def test_a_folder_of_somebody_else_is_not_used(cache: Cache, folder: Path, fault: Fault) -> None:
    good, _ = use(cache, folder)
    os.chown(folder / "cache", 65534, -1)
    start = time.monotonic()
    again, said = use(cache, folder)
    fault.seconds = time.monotonic() - start
    assert (again, said.strip()) == (good, cache.refuses)
    fault.sees = f"a warning, `{cache.refuses}`"
    fault.leaks = strays(folder)


@on_cache("is on a read-only file system")
def test_a_read_only_file_system_is_said(cache: Cache, folder: Path, fault: Fault) -> None:
    (folder / "cache").mkdir(mode=0o700)
    start = time.monotonic()
    _, said = use(cache, folder, mount="mount --bind -o ro cache cache")
    fault.seconds = time.monotonic() - start
    assert said == f"{cache.keeps_nothing}Read-only file system\n"
    fault.sees = f"a warning, `{said.strip()}`"
    fault.leaks = strays(folder)


@on_cache("is on a full disk")
def test_a_full_disk_is_said(cache: Cache, folder: Path, fault: Fault) -> None:
    (folder / "cache").mkdir(mode=0o700)
    fill = "mount -t tmpfs -o size=16k,mode=700 full cache; ! cat /dev/zero 2>/dev/null >cache/full"
    start = time.monotonic()
    _, said = use(cache, folder, mount=fill)
    fault.seconds = time.monotonic() - start
    assert said == f"{cache.keeps_nothing}No space left on device\n"
    fault.sees = f"a warning, `{said.strip()}`"
    fault.leaks = strays(folder)


@on_cache("is damaged, and 8 processes race to repair it")
def test_processes_race_on_a_damaged_cache(cache: Cache, folder: Path, fault: Fault) -> None:
    good, _ = use(cache, folder)
    (entry,) = (folder / "cache").iterdir()
    entry.write_bytes(cut(entry.read_bytes()))
    racers = [start_process(cache, folder, "wait") for _ in range(8)]
    results, fault.seconds = race(racers, timeout_s=120)
    assert {got for got, _ in results} == {good}
    assert all(cache.rejects in said for _, said in results if said)
    assert use(cache, folder) == (good, "")
    fault.injected = 8
    fault.sees = f"warnings, `… {cache.rejects}`; all processes get the same"
    fault.leaks = strays(folder)


def use(cache: Cache, folder: Path, *, before: str = "", mount: str = "") -> tuple[str, str]:
    """Return what a process got from the cache, and what it said; `mount`: on a disk of its own."""
    process = start_process(cache, folder, before=before, mount=mount)
    got, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return got, said


def start_process(
    cache: Cache, folder: Path, *arguments: str, before: str = "", mount: str = ""
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + cache.program, *arguments]
    if mount:
        if not can_mount():
            pytest.skip("this user may not mount in a namespace of its own")
        script = f"set -e; {mount}; exec {shlex.join(command)}"
        command = ["unshare", "--mount", "bash", "-c", script]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def can_mount() -> bool:
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "probe", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def strays(folder: Path) -> int:
    """Count the temporary files that the cache's users left: none."""
    left = [path.name for path in (folder / "cache").iterdir() if path.suffix == ".partial"]
    assert not left
    return len(left)
