"""Every order of the steps of several ranks' programs, replayed for ever: a model of memory.

A piece of memory holds the number of the op that its content is of. A rank that comes late is one
whose steps come last, so lateness needs no steps of its own. Two steps that touch the same memory
may overlap if there is a state in which both can be taken: then one of them must only read.
"""

from collections import deque
from dataclasses import dataclass

from streams import Add, After, Call, Copy, Program, Wait, Write

REPLAYS = 3  # told apart; ranks are less than two ops apart


class Broken(AssertionError):
    """Something that no order of steps may lead to."""


@dataclass(frozen=True)
class Slot:
    """A half batch on all ranks: where each keeps the rows that each owns."""

    rows: tuple[tuple[int, ...], ...]  # addresses by rank and owner, without owners of none
    num_bytes: tuple[int, ...]  # by owner, likewise


@dataclass(frozen=True)
class Use:
    """A step's pieces of memory."""

    reads: frozenset[int]
    writes: frozenset[int]

    def collides(self, other: "Use") -> bool:
        return bool(self.writes & (other.reads | other.writes) or other.writes & self.reads)


NOTHING = Use(frozenset(), frozenset())


class Explorer:
    """Visits every state. Slot i is what the i-th op of each program works on, in place."""

    def __init__(self, programs: list[Program], slots: list[Slot]) -> None:
        self._slots = slots
        self._steps = []  # by stream of all ranks
        self._ranks = []  # by stream
        self._index = {}  # (rank, stream) to its index here
        for rank, program in enumerate(programs):
            for stream in program.streams:
                self._index[rank, stream] = len(self._ranks)
                self._ranks.append(rank)
                self._steps.append(program.streams[stream])
        self._own = [
            [i for i, owner in enumerate(self._ranks) if owner == rank]
            for rank in range(len(programs))
        ]
        every = [step for steps in self._steps for step in steps]
        rows = [address for slot in slots for row in slot.rows for address in row]
        copied = [step.target for step in every if isinstance(step, Copy)]  # staging, too
        self._pieces = _indices([*rows, *copied])
        self._flags = _indices(step.address for step in every if isinstance(step, Wait))
        self._sizes = {
            address: size
            for slot in slots
            for row in slot.rows
            for address, size in zip(row, slot.num_bytes, strict=True)
        }
        self._uses = [[self._use(i, step) for step in steps] for i, steps in enumerate(self._steps)]

    def explore(self) -> int:
        """Return the number of states.

        Raises:
            Broken: naming the steps.
        """
        first = self._settle(self._start())
        frontier, visited = deque([first]), {first}
        while frontier:
            state = frontier.popleft()
            ready = [i for i in range(len(self._steps)) if self._is_ready(state, i)]
            if not ready:
                raise Broken(f"nobody can go on: {state[0]}")
            self._check_overlap(state, ready)
            for stream in ready:
                following = self._settle(self._after_step(state, stream))
                if following not in visited:
                    visited.add(following)
                    frontier.append(following)
        return len(visited)

    def _start(self):
        content = [-1] * len(self._pieces)
        for number, slot in enumerate(self._slots):
            for row in slot.rows:
                for address in row:
                    content[self._pieces[address]] = self._number(-1, number) * 16 + 15
        return (
            (0,) * len(self._steps),
            (0,) * len(self._own),
            (0,) * len(self._flags),
            tuple(content),
        )

    def _number(self, replay, op):
        return replay % REPLAYS * len(self._slots) + op

    def _use(self, stream, step):
        if isinstance(step, Copy):
            for piece in {step.source, step.target} & self._sizes.keys():
                assert step.num_bytes == self._sizes[piece], "a copy of other rows than a share"
            use = ([step.source], [step.target])
        elif isinstance(step, Add) and step.params.num_rows:
            parts = [address for address in step.params.parts if address]
            use = (parts, [step.params.out])
        elif isinstance(step, Call):
            own = self._slots[step.op].rows[self._ranks[stream]]
            use = (own, own)
        else:
            return NOTHING
        return Use(*(frozenset(self._pieces[address] for address in side) for side in use))

    def _is_ready(self, state, stream):
        positions, _, flags, _ = state
        if positions[stream] == len(self._steps[stream]):
            return False
        step = self._steps[stream][positions[stream]]
        if isinstance(step, After):
            other = self._index[self._ranks[stream], step.stream]
            return positions[other] >= step.position
        if isinstance(step, Wait):
            return flags[self._flags[step.address]] == step.value
        return True

    def _check_overlap(self, state, ready):
        uses = [(i, self._uses[i][state[0][i]]) for i in ready]
        uses = [(i, use) for i, use in uses if use is not NOTHING]
        for n, (i, use) in enumerate(uses):
            for j, other in uses[n + 1 :]:
                if use.collides(other):
                    steps = [self._steps[s][state[0][s]] for s in (i, j)]
                    raise Broken(f"may overlap: {steps} of ranks {self._ranks[i], self._ranks[j]}")

    def _settle(self, state):
        """Take the steps that nobody else can see: so their order does not matter."""
        positions, replays, flags, content = state
        positions, replays = list(positions), list(replays)
        moved = True
        while moved:
            moved = False
            for rank, streams in enumerate(self._own):
                if all(positions[i] == len(self._steps[i]) for i in streams):
                    for i in streams:
                        positions[i] = 0
                    replays[rank] = (replays[rank] + 1) % REPLAYS
                    moved = True
            for i, steps in enumerate(self._steps):
                while positions[i] < len(steps) and self._is_private(positions, i):
                    positions[i] += 1
                    moved = True
        return tuple(positions), tuple(replays), flags, content

    def _is_private(self, positions, stream):
        step = self._steps[stream][positions[stream]]
        if isinstance(step, After):
            return self._is_ready((positions, None, None, None), stream)
        if isinstance(step, Add):
            return not step.params.num_rows
        return isinstance(step, Write) and step.address not in self._flags

    def _after_step(self, state, stream):
        positions, replays, flags, content = state
        step, rank = self._steps[stream][positions[stream]], self._ranks[stream]
        positions = (*positions[:stream], positions[stream] + 1, *positions[stream + 1 :])
        if isinstance(step, Write):
            flag = self._flags[step.address]
            if flags[flag] == step.value:
                raise Broken(f"a flag that is {step.value} is written again: {step}, rank {rank}")
            flags = (*flags[:flag], step.value, *flags[flag + 1 :])
        elif isinstance(step, Copy | Add | Call):
            content = list(content)
            self._change(content, rank, replays[rank], step)
            content = tuple(content)
        return positions, replays, flags, content

    def _change(self, content, rank, replay, step):
        at = self._pieces
        if isinstance(step, Copy):
            content[at[step.target]] = content[at[step.source]]
        elif isinstance(step, Add):
            found = [content[at[address]] for address in step.params.parts if address]
            number = found[rank] // 16
            if found != [number * 16 + peer for peer in range(len(self._own))]:
                raise Broken(f"rank {rank} adds parts of other ops: {found}")
            content[at[step.params.out]] = number * 16 + 15
        else:
            self._compute(content, rank, replay, step.op)

    def _compute(self, content, rank, replay, op):
        """The caller reads the result of the replay before, and writes new partial sums."""
        slot = self._slots[op]
        last, number = self._number(replay - 1, op), self._number(replay, op)
        for address in slot.rows[rank]:
            piece = self._pieces[address]
            if content[piece] != last * 16 + 15:
                raise Broken(f"rank {rank} reads rows of another op: {content[piece]}")
            content[piece] = number * 16 + rank


def _indices(addresses):
    return {address: index for index, address in enumerate(dict.fromkeys(addresses))}
