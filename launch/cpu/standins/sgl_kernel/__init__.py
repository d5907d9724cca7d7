"""Stand-in for `sgl_kernel`, SGLang's compiled kernels, which have no build for a plain CPU.

With SGLANG_USE_CPU_ENGINE=1 SGLang imports some `*_cpu` names whether it will call them or not:
those exist here, and raise when called. Every other name stays an ImportError, and nothing
registers under `torch.ops.sgl_kernel`: so SGLang finds out that it must take its plain torch paths.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    return absent(__name__, name)


def absent(module: str, name: str) -> Callable[..., NoReturn]:
    """Return a function in place of `module.name` that raises when called.

    Raises:
        AttributeError: `name` is none of those that SGLang imports unconditionally.
    """
    if not name.endswith("_cpu"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def raise_absent(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{module}.{name} is a stand-in: this machine has no sgl_kernel")

    return raise_absent
