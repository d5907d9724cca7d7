"""What an ordinary run leaves out: much the same happens in another test.

TOKENWEAVE_TEST=all runs it too, as the records of docs/compatibility.md and docs/reliability.md do.
"""

import os

import pytest

THOROUGH = os.environ.get("TOKENWEAVE_TEST") == "all"
rare = pytest.mark.skipif(not THOROUGH, reason="runs with TOKENWEAVE_TEST=all")
