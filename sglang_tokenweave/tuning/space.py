"""What may be tried at each batch size, the most promising first."""

from dataclasses import dataclass, replace

from sglang_tokenweave.plan import MOST_ONE_SHOT_TOKENS, Kind, Mode
from sglang_tokenweave.tuning.table import LEAST_SMS, OFF, Candidate

_MOVED = (-256, 256)  # tokens: the height of a tile


@dataclass(frozen=True)
class Space:
    """What may be tried on this server, of each kind the most promising first."""

    sms: int
    ctas: tuple[int, ...]  # beside a computation; 0: the copy engines
    fuse_ctas: tuple[int, ...]  # of the op alone
    smallest_woven_decode: int = 2  # requests
    has_one_shot: bool = False
    alike_tokens: int = 0  # ops alone of up to so many are the same, whatever their CTAs

    def candidates(self, mode: Mode, num_tokens: int) -> list[Candidate]:
        """Return all candidates for batches of `num_tokens`: OFF, then the most promising first."""
        takes_one_shot = self.has_one_shot and num_tokens <= MOST_ONE_SHOT_TOKENS
        others = self.fuse_ctas[:1] if num_tokens <= self.alike_tokens else self.fuse_ctas
        numbers = [*([0] if takes_one_shot else []), *others]
        fuses = [Candidate(Kind.FUSE, fuse_ctas=n) for n in numbers]
        smallest = self.smallest_woven_decode if mode is Mode.DECODE else 2
        if num_tokens < smallest:
            return [OFF, *fuses]
        as_planned = [
            Candidate(Kind.WEAVE, 0, ctas, max(self.fuse_ctas))
            for ctas in self.ctas
            if self.sms - ctas >= LEAST_SMS
        ]
        if mode is Mode.DECODE:  # two halves read all weights twice; one token is cut nowhere
            return [OFF, *fuses, *as_planned]
        moved = [
            replace(each, cut_offset=offset)
            for each in as_planned
            for offset in _MOVED
            if num_tokens >= 4 * abs(offset)  # a half shorter than a quarter hides nothing
        ]
        return [OFF, *as_planned, *fuses, *moved]


def bucket_sizes(largest: int, smallest: int) -> list[int]:
    """Return the powers of two from `smallest` on below `largest`, and `largest`."""
    sizes = [smallest << step for step in range(64) if smallest << step < largest]
    return [*sizes, largest] if largest >= smallest else []
