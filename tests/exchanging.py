"""Exchange descriptors among processes, some of them late or killed, and hear from each."""

import multiprocessing
import os
import time

from sglang_tokenweave.descriptors import _Exchange, exchange

PATIENCE_S = 20  # for what must succeed: two busy cores are slow, and it costs nothing when not


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


class Ranks:
    """Processes that run `function(rank, *arguments)`; what came of each is in `outcomes`."""

    def __init__(self, function, ranks, *arguments, start="fork"):
        context = multiprocessing.get_context(start)
        self._running = {}
        for rank in ranks:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_report, args=(sender, function, rank, arguments))
            process.start()
            sender.close()
            self._running[rank] = process, receiver

    def outcomes(self):
        """Return by rank the value, the exception, or None of a process that was killed."""
        found = {}
        for rank, (process, receiver) in self._running.items():
            assert receiver.poll(2 * PATIENCE_S), f"rank {rank} does not end"
            try:
                found[rank] = receiver.recv()
            except EOFError:
                found[rank] = None
            receiver.close()
            process.join()
            process.close()
        return found

    def are_running(self):
        return all(process.is_alive() for process, _ in self._running.values())

    def kill(self):
        for process, receiver in self._running.values():
            process.kill()
            process.join()
            receiver.close()


def _report(sender, function, rank, arguments):
    try:
        sender.send(function(rank, *arguments))
    except Exception as error:  # noqa: BLE001 - the parent looks at whatever it was
        sender.send(error)


def meet(rank, world_size, token, deadline_s=PATIENCE_S, late_s=None):
    """Write to every rank through the descriptor got from it; return what came through our own."""
    time.sleep((late_s or {}).get(rank, 0))
    before = open_descriptors()
    reader, writer = os.pipe()
    try:
        got = exchange(writer, rank, world_size, token, deadline_s)
        assert got[rank] == writer
        received = [fd for fd in got if fd != writer]
        assert not any(map(os.get_inheritable, received))
        for peer, descriptor in enumerate(got):
            os.write(descriptor, f"{rank:02}to{peer:02} ".encode())
        text = b""
        while len(text) < 7 * world_size:
            text += os.read(reader, 7 * world_size - len(text))
        for descriptor in received:
            os.close(descriptor)
        return sorted(text.decode().split())
    finally:
        os.close(reader)
        os.close(writer)
        assert open_descriptors() == before


def all_met(world_size):
    return {
        rank: [f"{peer:02}to{rank:02}" for peer in range(world_size)] for rank in range(world_size)
    }


def address(token, rank):
    return _Exchange(-1, rank, rank + 1, token)._address(rank)


def proof(token, sender, receiver):
    return _Exchange(-1, 0, 1, token)._proof(sender, receiver)
