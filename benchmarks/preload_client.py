"""What `client` has its fork server import: SGLang's client, if it can be.

An error here would end the fork server with a bare EOFError for the benchmark. Left alone, it comes
again in the load, whose log is shown.
"""

import contextlib
import importlib

from benchmarks import client

with contextlib.suppress(Exception):
    importlib.import_module(client.MODULE)
