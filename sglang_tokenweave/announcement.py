"""What a server that weaves says on its log."""

from sglang_tokenweave.config import TokenWeaveConfig
from sglang_tokenweave.tuning.tuner import Tuned


def who_decides(config: TokenWeaveConfig, tuned: Tuned | None, *, on_cpu: bool) -> str:
    """Return what plans are made by: a table, one that is measured next, or the thresholds."""
    if tuned is not None:
        return tuned.summary()
    if config.measures(on_cpu=on_cpu):
        return f"a table is measured next, in {config.tune_seconds} s at most"
    fuse = f">= {config.fuse_min_tokens} tokens" if config.fuse_min_tokens else "off"
    decode = f">= {config.decode_min_tokens} requests" if config.decode_min_tokens else "off"
    return (
        f"prefill woven: >= {config.min_tokens} tokens | fused unsplit: {fuse} | "
        f"decode woven: {decode}"
    )
