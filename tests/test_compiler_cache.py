"""Keeping compiled kernels on disk: hits, misses, damage, strangers, full disks and races."""

import json
import logging
import os
import shutil
import stat
from hashlib import sha256
from pathlib import Path

import pytest
from compiling import HEADER, KERNEL, compile_with, run_child, start_child, write_sources
from cuda.bindings import nvrtc
from exchanging import Ranks
from racing import race

from sglang_tokenweave import compiler
from sglang_tokenweave.compiler import CompileError


@pytest.fixture
def sources(tmp_path):
    return write_sources(tmp_path)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def compile_(sources, cache):
    return compile_with(sources, cache)


@pytest.fixture
def compilations(monkeypatch):
    """Return a list that grows by one with each run of the compiler."""
    compiler._compiler_identity()  # once per process, and no kernel
    runs = []
    original = nvrtc.nvrtcCompileProgram

    def spy(program, count, options):
        runs.append(options)
        return original(program, count, options)

    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", spy)
    return runs


@pytest.fixture(autouse=True)
def _warnings_start_anew(caplog):
    compiler._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger=compiler.__name__)


def test_second_time_comes_from_the_cache(compile_, compilations, cache, caplog):
    first = compile_()
    assert compile_() == first
    assert len(compilations) == 1
    assert len(list(cache.iterdir())) == 1
    assert not caplog.records


def test_whatever_decides_the_result_is_in_the_key(compile_, compilations, sources, cache):
    changes = [
        compile_,
        lambda: compile_(defines={"FACTOR": 3}),
        lambda: compile_(defines={"FACTOR": 4}),
        lambda: compile_(arch="sm_100a"),
        lambda: compile_("scale<Half, 5>"),
        lambda: (sources / "params.cuh").write_text(HEADER + "// changed\n") and compile_(),
        lambda: (sources / "new.cuh").write_text("") or compile_(),
        lambda: (sources / "kernel.cu").write_text(KERNEL + "// changed\n") and compile_(),
    ]
    for number, change in enumerate(changes, start=1):
        change()
        assert len(compilations) == number
    assert len(list(cache.iterdir())) == len(changes)
    (sources / "README.md").write_text("No code.")
    (sources / "other.cu").write_text("// No header.")
    compile_()
    assert len(compilations) == len(changes)


def test_another_compiler_misses(compile_, compilations, monkeypatch):
    compile_()
    monkeypatch.setattr(compiler, "_compiler_identity", lambda: "release 13.0, V13.0.89")
    compile_()
    assert len(compilations) == 2


def test_failures_leave_nothing_in_the_cache(compile_, cache):
    with pytest.raises(CompileError):
        compile_("absent<Half, 4>")
    assert not list(cache.iterdir())


def forged(content):
    """Return another header under a checksum that does not know the key."""
    _, header, cubin = content.split(b"\n", 2)
    body = json.dumps({**json.loads(header), "name": "other"}).encode() + b"\n" + cubin
    return sha256(body).hexdigest().encode() + b"\n" + body


DAMAGES = {
    "empty": lambda content: b"",
    "no newline": lambda content: content[:40],
    "only a checksum": lambda content: content[:65],
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "garbage": lambda content: b"\x80\x04\n\xff\n" * 99,
    "forged": forged,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_replaced(compile_, compilations, cache, caplog, damage):
    good = compile_()
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    entry.write_bytes(DAMAGES[damage](content))
    assert compile_() == good
    assert len(compilations) == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(entry) in record.message
    assert entry.read_bytes() == content
    assert compile_() == good
    assert len(compilations) == 2
    assert list(cache.iterdir()) == [entry]


def test_an_entry_under_another_name_is_not_taken(compile_, compilations, cache, caplog):
    compile_("scale<Half, 5>")
    (other,) = cache.iterdir()
    good = compile_()
    (entry,) = set(cache.iterdir()) - {other}
    shutil.copy(other, entry)
    assert compile_() == good
    assert len(compilations) == 3
    assert "damaged or foreign" in caplog.text


def test_an_entry_that_is_a_folder_does_no_harm(compile_, cache, caplog):
    good = compile_()
    (entry,) = cache.iterdir()
    entry.unlink()
    entry.mkdir()
    assert compile_() == compile_() == good
    assert len(caplog.records) == 2  # it cannot be read; it cannot be replaced
    assert list(cache.iterdir()) == [entry]


def test_cache_of_the_user(compile_, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "xdg" / "sglang_tokenweave" / "kernels"
    assert compiler.default_cache() == folder
    compile_(cache=None)
    (entry,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        at_home = tmp_path / "home" / ".cache" / "sglang_tokenweave" / "kernels"
        assert compiler.default_cache() == at_home


def test_a_user_without_a_home_compiles_without_a_cache(compile_, monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert compile_(cache=None) == compile_(cache=None)
    assert [record.message for record in caplog.records] == [
        "compiling without a cache: Could not determine home directory."
    ]


def test_a_cache_below_a_file_is_warned_of_once(compile_, tmp_path, caplog):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "cache"
    assert compile_(cache=below) == compile_(cache=below)
    compile_("scale<Half, 5>", cache=below)
    assert len(caplog.records) == 1
    assert str(below) in caplog.text


def test_a_cache_of_somebody_else_is_refused(compile_, compilations, cache, caplog):
    if os.geteuid() == 0:
        compile_()  # a good entry, but in a folder that another user then owns
        os.chown(cache, 65534, -1)
    else:
        cache = Path("/usr")
    before = len(compilations)
    assert compile_(cache=cache) == compile_(cache=cache)
    assert len(compilations) == before + 2
    assert len(caplog.records) == 1
    assert f"{cache} belongs to uid " in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_an_entry_of_somebody_else_is_replaced(compile_, compilations, cache, caplog):
    good = compile_()
    (entry,) = cache.iterdir()
    os.chown(entry, 65534, -1)
    assert compile_() == good
    assert len(compilations) == 2
    assert "damaged or foreign" in caplog.text
    assert entry.stat().st_uid == 0


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_cache_that_others_may_write_to_is_not_used(compile_, compilations, cache, caplog, mode):
    good = compile_()
    before = list(cache.iterdir())
    cache.chmod(mode)
    assert compile_() == compile_() == good
    assert len(compilations) == 3
    (record,) = caplog.records
    assert f"others may write to {cache} (mode {mode:o}); chmod 700" in record.message
    assert list(cache.iterdir()) == before
    cache.chmod(0o755)  # that others may read does no harm
    assert compile_() == good
    assert len(compilations) == 3


@pytest.mark.parametrize("mode", [0o660, 0o602])
def test_an_entry_that_others_may_write_to_is_replaced(compile_, compilations, cache, caplog, mode):
    good = compile_()
    (entry,) = cache.iterdir()
    entry.chmod(mode)
    assert compile_() == compile_() == good
    assert len(compilations) == 2
    (record,) = caplog.records
    assert "damaged or foreign" in record.message
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


@pytest.mark.parametrize("target", ["the entry itself, elsewhere", "/dev/zero", "nowhere"])
def test_an_entry_that_is_a_link_is_replaced(
    compile_, compilations, cache, tmp_path, caplog, target
):
    good = compile_()
    (entry,) = cache.iterdir()
    elsewhere = entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(elsewhere if target.startswith("the entry") else target)
    assert compile_() == compile_() == good
    assert len(compilations) == 2
    (record,) = caplog.records
    assert str(entry) in record.message
    assert entry.is_file()
    assert not entry.is_symlink()
    assert elsewhere.exists()  # the link was replaced, not what it led to


def test_an_entry_that_is_a_pipe_does_not_stop_the_server(compile_, compilations, cache, caplog):
    good = compile_()
    (entry,) = cache.iterdir()
    entry.unlink()
    os.mkfifo(entry, 0o600)
    assert compile_() == compile_() == good
    assert len(compilations) == 2
    assert "damaged or foreign" in caplog.text
    assert entry.is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_nothing_into_the_cache(compile_, compilations, cache, tmp_path, caplog):
    good = compile_()
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    outcomes = Ranks(_intrude_as_nobody, [0], cache, entry.name).outcomes()
    assert outcomes == {0: [PermissionError] * 4}
    assert entry.read_bytes() == content
    assert compile_() == good
    assert len(compilations) == 1
    assert not caplog.records


def _intrude_as_nobody(_, cache, name):
    """Return how each of four ways to the cache's content fails."""
    # By a descriptor, because the folders above may be closed to this user, too.
    handle = os.open(cache, os.O_PATH)
    os.setuid(65534)
    ways = (
        lambda: os.open(name, os.O_RDONLY, dir_fd=handle),
        lambda: os.open("planted.kernel", os.O_WRONLY | os.O_CREAT, dir_fd=handle),
        lambda: os.unlink(name, dir_fd=handle),
        lambda: os.listdir(f"/proc/self/fd/{handle}"),
    )
    errors = []
    for way in ways:
        try:
            way()
        except OSError as error:
            errors.append(type(error))
    return errors


def test_a_read_only_cache_is_warned_of_once(sources):
    code = """
folder = Path("cache")
good = compile_it(folder)
compiler._compile = lambda *_: good  # another user may not get at NVRTC or the test's folder
if os.geteuid() == 0:
    for path in (folder, *folder.iterdir()):
        os.chown(path, 65534, -1)
folder.chmod(0o500)
if os.geteuid() == 0:
    os.setuid(65534)
assert compile_it(folder) == good  # what is there may be read
compile_it(folder, 5)
compile_it(folder, 6)
assert len(list(folder.iterdir())) == 1
"""
    (warning,) = run_child(code, sources)
    assert warning == "compiled kernels are not kept: cache: Permission denied"


def test_a_full_disk_is_warned_of_once(sources):
    code = """
folder = Path("cache")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
assert compile_it(folder).cubin
assert compile_it(folder, 5).cubin
assert not list(folder.iterdir())
"""
    (warning,) = run_child(code, sources)
    assert warning == "compiled kernels are not kept: cache: File too large"


def test_processes_race_on_a_cold_cache(sources):
    code = """
from hashlib import sha256
compiler._compiler_identity()
print("ready", flush=True)
sys.stdin.readline()
compiled = compile_it(Path("cache"))
print(sha256(compiled.cubin).hexdigest(), compiled.name, compiled.resources)
"""
    results, _ = race([start_child(code, sources) for _ in range(8)], timeout_s=60)
    assert {said for _, said in results} == {""}
    assert len({printed for printed, _ in results}) == 1
    (entry,) = (sources / "cache").iterdir()
    assert entry.suffix == ".kernel"
