"""Stopping when asked: SIGINT and SIGTERM end a run after its step; a second one ends the process at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a signal has asked to stop.

    Args:
        signal: which one, None as long as there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stopping() -> Iterator[Stop]:
    """A block in which the two signals are taken down instead of ending the process; afterwards all is as it was.

    Signals reach the main thread alone; in another one nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: Any) -> None:
        stop.signal = number
        # whoever asks twice does not want to wait for a step to end
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    # one that is ignored, as SIGINT by a shell's background jobs, stays so; None is a handler that Python cannot set again
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_to_parent(_: int = 0) -> None:
    """What a reading process does at its start: a Ctrl-C reaches it too, but its parent decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
