"""Counts of what ran how, for the log, /server_info and Prometheus."""

from collections import Counter
from dataclasses import dataclass, field

from sglang_tokenweave.plan import Kind, Mode

_MODES = (Mode.PREFILL, Mode.DECODE)


@dataclass
class Stats:
    """Counters since start; the keys are values of labels."""

    batches: Counter[tuple[str, str]] = field(default_factory=Counter)  # (mode, plan)
    tokens: Counter[tuple[str, str]] = field(default_factory=Counter)  # (mode, plan)
    cuts: Counter[str] = field(default_factory=Counter)  # "inside" or "between" requests
    fallbacks: Counter[str] = field(default_factory=Counter)  # reason
    # Plans that lost on the live load: (mode, smallest number of tokens)
    drops: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_batches: int = 0

    def count(self, mode: Mode, kind: Kind, num_tokens: int) -> None:
        """Count a batch. Mixed ones count as prefill: they run as prefills."""
        key = (Mode.DECODE if mode is Mode.DECODE else Mode.PREFILL, kind)
        self.num_batches += 1
        self.batches[key] += 1
        self.tokens[key] += num_tokens

    def count_fallback(self, reason: str) -> bool:
        """Count a batch that could not run as planned; return whether the reason is new."""
        self.fallbacks[reason] += 1
        return self.fallbacks[reason] == 1

    def as_dict(self) -> dict[str, object]:
        """Return plain nested dicts, with every mode and plan present."""
        return {
            "batches": _nested(self.batches),
            "tokens": _nested(self.tokens),
            "cuts": {where: self.cuts[where] for where in ("inside", "between")},
            "fallbacks": dict(self.fallbacks),
            "drops": [{"mode": mode, "tokens": int(tokens)} for mode, tokens in self.drops],
        }


def _nested(counter: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    return {mode.value: {kind.value: counter[mode, kind] for kind in Kind} for mode in _MODES}
