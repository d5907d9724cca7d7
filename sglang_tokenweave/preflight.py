"""Check that SGLang's worker processes will find this extension."""

import os
from importlib.metadata import entry_points

GROUP = "sglang.srt.plugins"
PLUGIN = "tokenweave"


class NotInstalledError(RuntimeError):
    """SGLang would start without us."""


def check_plugin() -> None:
    """Make sure that SGLang has plugins and will load ours.

    Raises:
        NotInstalledError: saying what to install or to set.
    """
    try:
        import sglang.srt.plugins  # noqa: F401 - the import is the check
    except ImportError as error:
        raise NotInstalledError(
            f"sglang_tokenweave needs SGLang 0.5.17 or newer in this environment: {error}"
        ) from error
    problem = plugin_problem()
    if problem:
        raise NotInstalledError(problem)


def plugin_problem() -> str | None:
    """Return why SGLang's workers would not load our plugin, or None; SGLang is not imported."""
    if PLUGIN not in entry_points(group=GROUP).names:
        return (
            "sglang_tokenweave is importable but not installed, so SGLang's workers would not load "
            "it: run `pip install -e .` in its folder, or install its wheel"
        )
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed and PLUGIN not in {name.strip() for name in allowed.split(",")}:
        return f"SGLANG_PLUGINS={allowed!r} keeps SGLang from loading TokenWeave: add {PLUGIN!r}"
    return None
