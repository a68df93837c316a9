"""Ctrl-C and SIGTERM: a run stops where it can resume, all processes at the same place."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate.utils import gather_object

from rlhf.runs.errors import Stopped
from rlhf.runs.processes import num_processes

T = TypeVar("T")
_asked: list[int] = []  # the signals so far


@contextmanager
def stop_when_asked() -> Iterator[None]:
    """Note the first SIGINT or SIGTERM for `check_stop`; a second one ends the process at once."""

    def ask(number: int, _frame: Any) -> None:
        if _asked:
            os._exit(128 + number)
        _asked.append(number)
        print(
            "\nStopping at the next point to resume from; press again to stop at once.",
            file=sys.stderr,
            flush=True,
        )

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def asked_to_stop() -> int:
    """The signal that asked any of the processes to stop, or 0. All processes call it."""
    return after_step(False, 0)[0]


def after_step(due: bool, tokens: int) -> tuple[int, bool, int]:
    """What the processes agree on after each step, in one message. All processes call it.

    Args:
        due: whether a state is due here; the main process decides.
        tokens: of this process's micro-batches.
    Returns:
        the signal that asked any process to stop, or 0; whether to save; the fewest tokens.
    """
    number = _asked[0] if _asked else 0
    if num_processes() == 1:
        return number, due, tokens
    signals, dues, sizes = zip(*gather_object([(number, due, tokens)]), strict=True)
    return max(signals), dues[0], min(sizes)


def until_stopped(items: Iterable[T], together: bool = False) -> Iterator[T]:
    """Yield the items of a loop, with `check_stop` before each."""
    for item in items:
        check_stop(together)
        yield item


def check_stop(together: bool = False) -> None:
    """Raise Stopped if a signal has asked the run to end.

    Several processes must stop at the same place, so then only calls with `together` count, which
    all of them make.
    """
    if together or num_processes() == 1:
        number = asked_to_stop()
        if number:
            raise Stopped(number)
