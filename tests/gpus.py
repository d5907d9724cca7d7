"""The GPUs that tests between processes find here."""

import pytest
import torch

COUNT = torch.cuda.device_count()
# A rank on each GPU, as far as the kernel has forms for so many; two take turns on a single one.
RANKS = max((ranks for ranks in (4, 6, 8) if ranks <= COUNT), default=2)
WORDS = {2: "two GPUs", 4: "four GPUs"}


def on(count, *values):
    """Return a parameter of a test that needs so many GPUs."""
    too_few = pytest.mark.skipif(count > COUNT, reason=f"needs {count} CUDA devices")
    return pytest.param(*values, marks=[pytest.mark.multi_gpu, too_few], id=WORDS[count])
