"""Stand-in for `torchvision`, whose builds need a CUDA build of torch.

transformers and some of SGLang's model configurations import it on start-up, for images that a text
model never sees. Every name can be imported and mentioned; calling one raises.
"""

import enum
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

__version__ = "0.28.0"  # transformers compares it


class InterpolationMode(enum.Enum):
    """The resampling methods; transformers makes a table of them at import."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Absent:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{self._name} is a stand-in: this machine has no torchvision")

    def __getattr__(self, name: str) -> "_Absent":
        return _absent(self._name, name)


class _Module(ModuleType):
    InterpolationMode = InterpolationMode

    def __init__(self, name: str) -> None:
        super().__init__(name, "Stand-in; see the package.")
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> _Absent:
        return _absent(self.__name__, name)


def _absent(owner: str, name: str) -> _Absent:
    # Python and its libraries probe for special names; those have to be missing honestly.
    if name.startswith("__"):
        raise AttributeError(f"{owner!r} has no attribute {name!r}")
    return _Absent(f"{owner}.{name}")


# Parents before children, so that each is attached to a module that exists.
for _path in (
    "io",
    "models",
    "ops",
    "ops.boxes",
    "transforms",
    "transforms.functional",
    "transforms.v2",
    "transforms.v2.functional",
    "tv_tensors",
    "utils",
):
    _name = f"{__name__}.{_path}"
    _parent, _, _leaf = _name.rpartition(".")
    sys.modules[_name] = _Module(_name)
    setattr(sys.modules[_parent], _leaf, sys.modules[_name])
