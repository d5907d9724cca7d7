"""The sentences that a timeline says."""

from sglang_tokenweave.timeline.layers import Place
from sglang_tokenweave.timeline.overlap import Overlap

_NAMED = 3  # places with the most exposed communication that are named


def sentence(overlap: Overlap) -> str:
    """Return how much communication was hidden, and where the rest was exposed."""
    total = overlap.total
    text = (
        f"{percent(total.hidden, total.length)} of communication hidden "
        f"({duration(total.hidden)} of {duration(total.length)})"
    )
    worst = [(place, each.exposed) for place, each in overlap.by_place.items() if each.exposed]
    worst.sort(key=lambda pair: -pair[1])
    if not worst:
        return f"{text}; nothing exposed."
    named = ", ".join(f"{duration(length)} {_where(place)}" for place, length in worst[:_NAMED])
    rest = worst[_NAMED:]
    more = f", {duration(sum(length for _, length in rest))} in {len(rest)} more" if rest else ""
    return f"{text}; exposed: {named}{more}."


def _where(place: Place) -> str:
    return str(place) if place.layer is None else f"in {place}"


def summary(overlap: Overlap) -> str:
    """Return how long the step took, and what the GPU did meanwhile."""
    step = overlap.step
    cut = f", cut into {overlap.parts} parts" if overlap.parts > 1 else ""
    return (
        f"{step.name}: {duration(step.end - step.start)}{cut}; "
        f"computing {duration(overlap.computing.length)}, "
        f"exposed communication {duration(overlap.total.exposed)}, idle {duration(overlap.idle)}."
    )


def comparison(first: Overlap, second: Overlap) -> str:
    """Return how the second step compares with the first."""
    lengths = [each.step.end - each.step.start for each in (first, second)]
    exposed = [each.total.exposed for each in (first, second)]
    return (
        f"Step {duration(lengths[0])} against {duration(lengths[1])}: "
        f"{lengths[1] / lengths[0]:.2f}x; exposed communication {duration(exposed[0])} "
        f"against {duration(exposed[1])}."
    )


def percent(part: int, whole: int) -> str:
    """Return a share; only all is 100 %, only nothing is 0 %."""
    share = 100 * part / whole if whole else 0.0
    if 0 < part < whole:
        share = min(max(share, 1), 99) if round(share) in (0, 100) else share
    return f"{share:.0f} %"


def duration(nanoseconds: int) -> str:
    """Return a time with three digits or so."""
    if nanoseconds >= 1_000_000:
        return f"{nanoseconds / 1e6:.2f} ms"
    return f"{nanoseconds / 1e3:.0f} us" if nanoseconds >= 10_000 else f"{nanoseconds / 1e3:.1f} us"
