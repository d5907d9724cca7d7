"""Say of each communication operation which layer and which block of it it belongs to.

A profile names no layers. What it shows is an order: with tensor parallelism each layer sums twice,
after its attention and after its feed-forward block, and a woven layer does so once for each part.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from sglang_tokenweave.timeline import kinds
from sglang_tokenweave.timeline.kinds import Kind
from sglang_tokenweave.timeline.operations import Labelled, Operation
from sglang_tokenweave.timeline.trace import Range

BLOCKS = ("attention", "MLP")
_OUTSIDE = "outside the layers"
_LAYER_RANGE = re.compile(r"(?i)\blayers?[._ #:-]*(\d+)\b")
_WORDS = (re.compile(r"(?i)attn|attention"), re.compile(r"(?i)mlp|moe|ffn|feed"))


@dataclass(frozen=True)
class Place:
    """Where an operation belongs; `layer` is None outside of all layers (embedding, logits)."""

    layer: int | None
    block: str = ""  # of BLOCKS

    def __str__(self) -> str:
        return _OUTSIDE if self.layer is None else f"layer {self.layer} {self.block}".rstrip()


OUTSIDE = Place(None)


def count_parts(found: Sequence[Labelled]) -> int:
    """Return into how many parts the batch is cut: feed-forward blocks between two attentions.

    One where neither is recognised by its name.
    """
    computations = [each.activity.name for each in found if each.label.kind is Kind.COMPUTATION]
    marks = [
        "a" if kinds.is_attention(n) else "f" if kinds.is_activation(n) else ""
        for n in computations
    ]
    runs = [(mark, len(list(run))) for mark, run in groupby(mark for mark in marks if mark)]
    blocks = Counter(length for mark, length in runs if mark == "f")
    if not blocks or not any(mark == "a" for mark, _ in runs):
        return 1
    return max(blocks, key=lambda length: (blocks[length], -length))


def places(
    operations: Sequence[Operation],
    found: Sequence[Labelled],
    ranges: Sequence[Range],
    parts: int,
) -> tuple[Place, ...]:
    """Return the place of each operation, by the program's own ranges or else by their order."""
    telling = [each for each in ranges if _LAYER_RANGE.search(each.name) or _block(each.name)]
    named = [_named(operation, telling) for operation in operations]
    if any(place is not None for place in named):
        return tuple(place or OUTSIDE for place in named)
    first = _first_attention(found)
    inside = [each.kind is Kind.SUM and each.start >= first for each in operations]
    placed, position = [], 0
    for is_inside in inside:
        placed.append(_by_order(position, parts) if is_inside else OUTSIDE)
        position += is_inside
    return tuple(placed)


def _by_order(position: int, parts: int) -> Place:
    layer, within = divmod(position, len(BLOCKS) * parts)
    return Place(layer, BLOCKS[within // parts])


def _first_attention(found: Sequence[Labelled]) -> int:
    """Return when the first layer's attention starts: a sum before is the embedding's."""
    starts = (
        activity.start
        for activity, label in found
        if label.kind is Kind.COMPUTATION and kinds.is_attention(activity.name)
    )
    return min(starts, default=0)


def _named(operation: Operation, ranges: Sequence[Range]) -> Place | None:
    """Return the place that the innermost ranges around the operation's start name."""
    layer, block = None, ""
    around = [each for each in ranges if each.start <= operation.start < each.end]
    for each in sorted(around, key=lambda each: each.start - each.end):  # widest first
        if match := _LAYER_RANGE.search(each.name):
            layer = int(match[1])
        block = _block(each.name) or block
    return None if layer is None else Place(layer, block)


def _block(name: str) -> str:
    found = (block for block, words in zip(BLOCKS, _WORDS, strict=True) if words.search(name))
    return next(found, "")
