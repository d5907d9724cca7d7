"""Stand-in for `sgl_kernel.mamba`; see the package."""

from collections.abc import Callable
from typing import NoReturn

from sgl_kernel import absent


def __getattr__(name: str) -> Callable[..., NoReturn]:
    return absent(__name__, name)
