"""The kept tables: found by their key, and no fault of a disk or of a stranger stops a server."""

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from racing import race
from tuned_tables import KEY, WEAVE, bucket, table

from sglang_tokenweave.tuning import cache
from sglang_tokenweave.tuning.text import MOST_BYTES, to_text

GOOD = table(bucket(64), bucket(1024, WEAVE))
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger=cache.logger.name)
    return tmp_path / "cache" / "tables"


def test_a_table_is_found_by_its_key_alone(folder, caplog):
    assert cache.load(KEY, folder) is None
    path = cache.store(GOOD, folder)
    assert path.name.startswith("nvidia-h200-llamaforcausallm-tp8-")
    assert cache.load(KEY, folder) == to_text(GOOD)
    for other in (replace(KEY, driver="1"), replace(KEY, layers=2), replace(KEY, sglang="0.5.21")):
        assert cache.load(other, folder) is None
    assert list(folder.iterdir()) == [path]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert not caplog.records


def test_a_table_that_a_person_edited_is_used(folder):
    path = cache.store(GOOD, folder)
    edited = path.read_text().replace(
        "chosen: {kind: weave, ctas: 8, fuse_ctas: 16}", "chosen: {kind: off}"
    )
    path.write_text(edited)
    assert cache.load(KEY, folder) == edited != to_text(GOOD)


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.path_of(KEY).parent == tmp_path / "sglang_tokenweave" / "tables"


def truncated(path):
    path.write_text(path.read_text()[:-30])


def corrupt(path):
    path.write_bytes(path.read_bytes().replace(b"weave", b"w\xffave"))


def other_version(path):
    path.write_text(path.read_text().replace("format: 2", "format: 99"))


def too_large(path):
    path.write_text(path.read_text() + "#" * MOST_BYTES)


def of_another_key(path):
    path.write_text(path.read_text().replace("NVIDIA H200", "NVIDIA B200"))


def writable_by_others(path):
    path.chmod(0o666)


def link(path):
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder_in_its_place(path):
    path.unlink()
    path.mkdir()


def open_folder(path):
    path.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncated, r"line \d+"),
        (corrupt, "codec"),
        (other_version, "line 2, field format: got 99; this release reads 2: tune again"),
        (too_large, "longer than"),
        (of_another_key, "it is of another key: gpu 'NVIDIA B200' .here 'NVIDIA H200'"),
        (writable_by_others, "it is no file of this user alone"),
        (link, "symbolic link|symlink|Too many levels"),
        (pipe, "it is no file of this user alone"),
        (folder_in_its_place, "directory|no file"),
        (open_folder, "others may write to"),
    ],
)
def test_a_damaged_table_is_said_once_and_not_used(folder, caplog, damage, problem):
    path = cache.store(GOOD, folder)
    damage(path)
    assert cache.load(KEY, folder) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("TokenWeave uses no kept table: ")
    assert re.search(problem, record.getMessage()), record.getMessage()


def test_a_damaged_table_is_replaced(folder, caplog):
    truncated(cache.store(GOOD, folder))
    assert cache.load(KEY, folder) is None
    cache.store(GOOD, folder)
    assert cache.load(KEY, folder) == to_text(GOOD)
    assert len(caplog.records) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_not_used(folder, caplog):
    cache.store(GOOD, folder)
    os.chown(folder, 65534, -1)
    assert cache.load(KEY, folder) is None
    assert cache.store(GOOD, folder) is None
    assert all("belongs to uid 65534, not 0" in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 2


CHILD = """
import os, resource, sys
from pathlib import Path
from sglang_tokenweave.tuning import cache
from sglang_tokenweave.tuning.text import from_text
table = from_text(Path("table.yaml").read_text())
folder = Path("cache")
"""


def start(code, tmp_path):
    (tmp_path / "table.yaml").write_text(to_text(GOOD))
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


READ_ONLY = """
folder.mkdir(mode=0o500)
if os.geteuid() == 0:
    os.setuid(65534)  # whom the folder does not belong to, either
"""


@pytest.mark.parametrize(
    ("hindrance", "problem"),
    [
        (READ_ONLY, r"Permission denied|belongs to uid 0"),
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))", "File too large"),
        ("folder.touch()", "File exists"),
    ],
)
def test_what_cannot_be_kept_is_said_and_leaves_nothing(tmp_path, hindrance, problem):
    tmp_path.chmod(0o777)
    child = start(f"{hindrance}\nassert cache.store(table, folder) is None", tmp_path)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 0, said
    (line,) = said.splitlines()
    assert line.startswith("TokenWeave does not keep the table that it measured: ")
    assert re.search(problem, line)
    assert not list(tmp_path.glob("cache/*"))


def test_processes_race(tmp_path):
    code = """
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    assert cache.store(table, folder)
    assert cache.load(table.key, folder)
"""
    results, _ = race([start(code, tmp_path) for _ in range(8)], timeout_s=60)
    assert {said for _, said in results} == {""}
    (path,) = (tmp_path / "cache").iterdir()
    assert path.read_text() == to_text(GOOD)
