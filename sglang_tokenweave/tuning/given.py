"""Check the file that an operator names, before any process is started."""

from pathlib import Path

from sglang_tokenweave.config import TokenWeaveConfig, describe
from sglang_tokenweave.tuning import text
from sglang_tokenweave.tuning.nodes import TableError


def check(config: TokenWeaveConfig) -> None:
    """Make sure that the table can be read, or written where it will be measured.

    Raises:
        TableError: it cannot; for a table that is wrong, with line and field.
    """
    if not config.table:
        return
    path = Path(config.table)
    if config.tune != "force":
        text.read_file(path)
    elif not path.parent.is_dir():
        raise TableError(f"{describe('table')} is {path}; there is no folder {path.parent}")
