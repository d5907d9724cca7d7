"""Keep tuned tables between starts, one file for each key, in a folder of this user alone.

Nothing here stops a server: what cannot be read or written is said once, and the server measures
again or goes on without a table.
"""

import hashlib
import json
import logging
import re
from dataclasses import asdict
from pathlib import Path

from sglang_tokenweave import user_cache
from sglang_tokenweave.tuning import text
from sglang_tokenweave.tuning.nodes import TableError
from sglang_tokenweave.tuning.table import Key, Table

logger = logging.getLogger(__name__)


def path_of(key: Key, folder: Path | None = None) -> Path:
    """Return where the table of a key is kept: a name that says what it is of, and a hash.

    Raises:
        RuntimeError: this user has no home folder.
    """
    digest = hashlib.sha256(json.dumps([text.FORMAT, asdict(key)], sort_keys=True).encode())
    readable = re.sub(r"[^a-z0-9]+", "-", f"{key.gpu} {key.model} tp{key.tp_size}".lower())
    folder = user_cache.folder("tables") if folder is None else folder
    return folder / f"{readable[:100].strip('-')}-{digest.hexdigest()[:16]}.yaml"


def load(key: Key, folder: Path | None = None) -> str | None:
    """Return the text of the table that is kept for a key, or None."""
    try:
        path = path_of(key, folder)
        if not path.parent.exists():
            return None
        user_cache.make_private(path.parent)
        content = user_cache.read(path, text.MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        logger.warning("TokenWeave uses no kept table: %s", error)
        return None
    problem = _problem(content, key)
    if problem is None:
        return (content or b"").decode()
    logger.warning("TokenWeave uses no kept table: %s: %s", path, problem)
    return None


def store(table: Table, folder: Path | None = None) -> Path | None:
    """Keep a table in place of what is kept for its key; return the file, None if that failed."""
    try:
        path = path_of(table.key, folder)
        user_cache.make_private(path.parent)
        user_cache.write(path, text.to_text(table).encode())
    except (OSError, RuntimeError) as error:
        logger.warning("TokenWeave does not keep the table that it measured: %s", error)
        return None
    return path


def _problem(content: bytes | None, key: Key) -> str | None:
    if content is None:
        return "it is no file of this user alone"
    try:
        found = text.from_text(content.decode()).key
    except (TableError, UnicodeError) as error:
        return str(error)
    differences = found.differences(key)
    return f"it is of another key: {differences}" if differences else None
