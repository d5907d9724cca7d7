"""How the benchmarks of whole servers end: their table, an error, or a signal."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from benchmarks import servers, table
from benchmarks.load import LoadError
from benchmarks.schema import Result
from launch.processes import Stop

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(measure: Callable[[], Result]) -> int:
    """Print the table of what `measure` returns.

    Returns:
        0; 1 if a server or a load failed; 2 if this machine or the command line cannot work;
        128 + signal if one asked to stop: all servers have ended then.
    """
    try:
        with _stopping_in_order():
            result = measure()
    except (servers.ServerError, LoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stop as stop:
        print(f"error: stopped by {stop}", file=sys.stderr)
        return 128 + stop.signum
    print(table.text(result))
    return 0


@contextmanager
def _stopping_in_order() -> Iterator[None]:
    """Raise `Stop` on a signal, so that the servers are ended on the way out, not left behind."""

    def stop(signum: int, frame: FrameType | None) -> None:
        servers.ENDING.set()  # threads that wait for servers to start
        raise Stop(signum)

    before = {signum: signal.signal(signum, stop) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
