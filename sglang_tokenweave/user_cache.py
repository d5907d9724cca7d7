"""Files that this user keeps between runs: in private folders, written whole, read as they are."""

import os
import stat
import tempfile
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotPrivateError(RuntimeError):
    """Others own a folder, or may write to it: what is in it may be theirs."""


def folder(name: str) -> Path:
    """Return this user's folder for one kind of file, whether it exists or not.

    Raises:
        RuntimeError: this user has no home folder.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    root = named if named.is_absolute() else Path.home() / ".cache"
    return root / "sglang_tokenweave" / name


def make_private(folder: Path) -> None:
    """Make a folder, or make sure that an existing one is this user's alone.

    Raises:
        OSError: it cannot be made.
        NotPrivateError: it is not this user's alone.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    owner, mode = status.st_uid, stat.S_IMODE(status.st_mode)
    if owner != os.geteuid():
        raise NotPrivateError(f"{folder} belongs to uid {owner}, not {os.geteuid()}")
    if mode & _OTHERS_WRITE:
        raise NotPrivateError(f"others may write to {folder} (mode {mode:o}); chmod 700")


def read(path: Path, most_bytes: int = -1) -> bytes | None:
    """Return a file's content, at most so many bytes; None if it is no file of this user alone.

    Raises:
        OSError: it cannot be read; FileNotFoundError: it is not there.
    """
    with open(path, "rb", opener=_open_itself) as stream:
        status = os.fstat(stream.fileno())
        # Where others may write, even a right checksum proves nothing: everyone can compute it.
        is_ours = status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_WRITE
        return stream.read(most_bytes) if is_ours and stat.S_ISREG(status.st_mode) else None


def write(path: Path, content: bytes) -> None:
    """Put a whole file at `path`, in place of what is there; readers see the one or the other.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with open(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _open_itself(path: str, flags: int) -> int:
    """Open what stands at a path, not what a link there leads to, and wait for no pipe's writer."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
