"""The entry point that SGLang calls in each of its processes (group `sglang.srt.plugins`)."""

from sglang_tokenweave import flags, hooks


def register() -> None:
    """Register our hooks with SGLang; only the flags unless TokenWeave is switched on."""
    config = flags.read_or_exit()
    wanted = [hook for hook in hooks.HOOKS if config.enabled or hook.role is hooks.Role.FLAGS]
    hooks.register(wanted, strict=config.strict)
