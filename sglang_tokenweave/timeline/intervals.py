"""Sets of moments: unions of half-open intervals of integers, so that lengths add up exactly."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Intervals:
    """Disjoint spans `[start, end)` in ascending order, none empty, no two touching."""

    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> "Intervals":
        """Return the union of any spans, in any order."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted(pair for pair in pairs if pair[0] < pair[1]):
            if merged and start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], end)
            else:
                merged.append((start, end))
        return cls(tuple(merged))

    @property
    def length(self) -> int:
        return sum(end - start for start, end in self.spans)

    def __or__(self, other: "Intervals") -> "Intervals":
        return Intervals.of((*self.spans, *other.spans))

    def __and__(self, other: "Intervals") -> "Intervals":
        both, i, j = [], 0, 0
        while i < len(self.spans) and j < len(other.spans):
            (start, end), (first, last) = self.spans[i], other.spans[j]
            if max(start, first) < min(end, last):
                both.append((max(start, first), min(end, last)))
            if end < last:
                i += 1
            else:
                j += 1
        return Intervals(tuple(both))

    def __sub__(self, other: "Intervals") -> "Intervals":
        left = []
        j = 0
        for start, end in self.spans:
            while j < len(other.spans) and other.spans[j][1] <= start:
                j += 1
            k = j
            while k < len(other.spans) and other.spans[k][0] < end:
                if start < other.spans[k][0]:
                    left.append((start, other.spans[k][0]))
                start = other.spans[k][1]
                k += 1
            if start < end:
                left.append((start, end))
        return Intervals(tuple(left))
