"""Ranks as threads of this process: a group for them, and a detector of hangs."""

import threading
from contextlib import ExitStack

from sglang_tokenweave.agreement import LostRankError

_LIMIT_S = 30


class HangError(BaseException):
    """All ranks that still run wait for something that none of them will bring about."""


class KilledError(BaseException):
    """A test ends a rank here."""


class World:
    """The ranks that run, and what each of them waits for."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.changed = threading.Condition()  # its lock guards everything that ranks share
        self.rounds = {}
        self._running = set(range(world_size))
        self._waits = {}
        self._hang = None
        self._here = threading.local()

    @property
    def rank(self):
        return self._here.rank

    def is_running(self, rank):
        return rank in self._running

    def wait(self, predicate, what):
        """Block this rank until `predicate()`; `changed` is held."""
        self._waits[self.rank] = (predicate, what)
        self.changed.notify_all()
        while not predicate():
            waiting = self._waits.items()
            if (
                not self._hang
                and self._waits.keys() == self._running
                and not any(is_over() for _, (is_over, _) in waiting)
            ):
                self._hang = "; ".join(f"rank {rank}: {it}" for rank, (_, it) in sorted(waiting))
            if self._hang:
                self.changed.notify_all()
                raise HangError(self._hang)
            assert self.changed.wait(_LIMIT_S), f"rank {self.rank} waits too long: {what}"
        del self._waits[self.rank]
        self.changed.notify_all()

    def run(self, function):
        """Call `function(group)` on every rank; return by rank its value or what it raised."""
        outcomes = [None] * self.world_size
        with ExitStack() as stack:
            for rank in range(self.world_size):
                thread = threading.Thread(target=self._run, args=(function, rank, outcomes))
                thread.start()
                stack.callback(self._join, thread)
        return outcomes

    @staticmethod
    def _join(thread):
        thread.join(_LIMIT_S)
        assert not thread.is_alive(), "a rank does not end"

    def _run(self, function, rank, outcomes):
        self._here.rank = rank
        try:
            outcomes[rank] = function(LocalGroup(self, rank))
        except BaseException as error:  # noqa: BLE001 - the test looks at whatever it was
            outcomes[rank] = error
        with self.changed:
            self._running.discard(rank)
            self._waits.pop(rank, None)
            self.changed.notify_all()


class LocalGroup:
    """A Group of threads. Its deadline needs no clock: a rank that has ended does not come."""

    def __init__(self, world, rank):
        self.rank = rank
        self.world_size = world.world_size
        self._world = world
        self._count = 0

    def gather(self, value):
        world = self._world
        with world.changed:
            values = world.rounds.setdefault(self._count, {})
            values[self.rank] = value
            self._count += 1

            def is_over():
                return all(r in values or not world.is_running(r) for r in range(self.world_size))

            world.wait(is_over, f"gather {self._count}")
            lost = [r for r in range(self.world_size) if r not in values]
            if lost:
                raise LostRankError(f"rank {self.rank}: rank(s) {lost} did not come")
            return [values[r] for r in range(self.world_size)]
