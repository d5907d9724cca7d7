"""Hide tensor-parallel communication in SGLang, after TokenWeave (arXiv 2505.11329)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "TokenWeaveConfig", "__version__"]

if TYPE_CHECKING:
    from sglang_tokenweave.config import TokenWeaveConfig
    from sglang_tokenweave.engine import Engine


def __getattr__(name: str) -> Any:
    # Lazy: SGLang loads this package in each of its processes, and most need nothing of it.
    if name == "Engine":
        from sglang_tokenweave.engine import Engine

        return Engine
    if name == "TokenWeaveConfig":
        from sglang_tokenweave.config import TokenWeaveConfig

        return TokenWeaveConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
