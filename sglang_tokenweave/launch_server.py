"""`python -m sglang_tokenweave.launch_server <our flags> <any SGLang flags>`."""

import os
import sys
from collections.abc import Sequence

from sglang_tokenweave.config import flag
from sglang_tokenweave.preflight import NotInstalledError, check_plugin


def main(arguments: Sequence[str]) -> None:
    """Serve as `python -m sglang.launch_server` does, with TokenWeave switched on.

    Raises:
        SystemExit: bad flags, or SGLang or this extension is not installed.
    """
    try:
        check_plugin()
    except NotInstalledError as error:
        raise SystemExit(f"sglang_tokenweave: error: {error}") from error

    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args([flag("enabled"), *arguments])
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":  # SGLang's workers are spawned and import this module again
    main(sys.argv[1:])
