"""Notice that a plan loses on the live load, and drop it: a pure state machine, fed with times.

A table is measured on an idle machine. Later, clocks fall, neighbours move in, requests are of
other lengths. So now and then two batches that would be woven or fused run stock, and the next two
of their kind run as planned. The second of each is timed, the first lets a GPU at its power limit
come to the clocks that such batches have: a pair, lost if the planned one took longer for each
token.

The rule is Wald's sequential probability ratio test (1945) of "half of the pairs are lost or fewer"
against "three quarters are". While the first is true the ratio is a martingale that starts at 1, so
it reaches 1000 with a probability of at most 1/1000 (Ville's inequality): that is the rate of false
alarms of a test. A plan that loses every pair is dropped after 18 of them. Where the ratio falls
below 1/20 the plan has proved itself, and a new test begins: it may lose later. A batch that runs
stock costs what the plan gains, so each proof makes the pairs four times as rare, up to sixteen
times; and a pair that was won by much makes them so rare that they cost 1/400 of stock's time.
One that is lost makes them as frequent as at first.

All ranks drop together: they count the same batches, pair the same ones, and are fed with the times
of the slowest rank.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

PERIOD = 64  # eligible batches of a bucket from one pair to the next, before it has proved itself
_RARER, _RAREST = 4, 16  # as many times
_MOST_COST = 1 / 400  # of stock's time
_LOST = math.log(0.75 / 0.5)
_WON = math.log(0.25 / 0.5)
_STOCK_TURNS, _SAMPLED_TURNS = (3, 2), (2, 0)  # batches before the end of a period
_DROP = math.log(1000)
_PROVEN = math.log(1 / 20)


@dataclass
class Bucket:
    """The batches that one row of the table plans."""

    period: int
    next_period: int  # from the end of this one on
    batches: int = 0  # eligible ones of this period
    stock_us: float | None = None  # for each token, of the pair's first batch
    evidence: float = 0.0  # logarithm of the likelihood ratio: above 0 for "it loses"
    pairs: int = 0
    lost: int = 0
    is_dropped: bool = False


@dataclass
class Guard:
    """Decides which batches of each bucket run stock for comparison, and which buckets always."""

    period: int = PERIOD
    buckets: dict[Hashable, Bucket] = field(default_factory=dict)

    def runs_stock(self, key: Hashable) -> bool:
        """Count a batch that a row plans; return whether it runs stock all the same."""
        bucket = self.buckets.setdefault(key, Bucket(self.period, self.period))
        if bucket.is_dropped:
            return True
        if bucket.batches == bucket.period:
            bucket.batches, bucket.period = 0, bucket.next_period
        bucket.batches += 1
        return bucket.period - bucket.batches in _STOCK_TURNS

    def is_sampled(self, key: Hashable) -> bool:
        """Whether the batch counted last is one of a pair, so that its time is wanted."""
        bucket = self.buckets[key]
        return not bucket.is_dropped and bucket.period - bucket.batches in _SAMPLED_TURNS

    def add(self, key: Hashable, *, is_stock: bool, us: float, num_tokens: int) -> bool:
        """Take a sampled batch's time on the slowest rank; return whether that drops the plan."""
        bucket = self.buckets[key]
        if is_stock:
            bucket.stock_us = us / num_tokens
            return False
        if bucket.stock_us is None or bucket.is_dropped:
            return False
        planned_us, stock_us, bucket.stock_us = us / num_tokens, bucket.stock_us, None
        is_lost = planned_us > stock_us
        bucket.pairs += 1
        bucket.lost += is_lost
        bucket.evidence += _LOST if is_lost else _WON
        if is_lost:
            bucket.next_period = self.period
        elif planned_us < stock_us:
            batches = len(_STOCK_TURNS) * (1 - planned_us / stock_us) / _MOST_COST
            self._make_rarer(bucket, math.ceil(batches))
        if bucket.evidence < _PROVEN:
            bucket.evidence = 0.0
            self._make_rarer(bucket, _RARER * bucket.period)
        bucket.is_dropped = bucket.evidence >= _DROP
        return bucket.is_dropped

    def _make_rarer(self, bucket: Bucket, period: int) -> None:
        bucket.next_period = max(bucket.next_period, min(period, _RAREST * self.period))

    def dropped(self) -> list[Hashable]:
        """Return the buckets whose plans lost."""
        return [key for key, bucket in self.buckets.items() if bucket.is_dropped]
