"""What a kernel's PTX says."""

import re
from collections import Counter


def global_accesses(ptx):
    """Return the forms of loads and stores of global memory, with their numbers."""
    return Counter(
        re.findall(
            r"(?<![\w.])((?:multimem|ld|st|cp|red|atom)\.(?!param|shared|local)[\w.:]+)[\s;]", ptx
        )
    )


def early_start(ptx):
    """Return what comes before the wait for the kernel before, and between it and the next start.

    Raises:
        AssertionError: it does not wait, or lets nothing start.
    """
    before, waits, after = ptx.partition("griddepcontrol.wait;")
    between, starts, _ = after.partition("griddepcontrol.launch_dependents;")
    assert waits
    assert starts
    return before, between
