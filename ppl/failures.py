"""What Python functions of users did wrong: said once for every run, with how often.

A function on the host reports each batch of its calls (`report`).  Inside of `said_once`, in which
every public sampler runs, the words come at the end and count the whole run; elsewhere at the first
failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Hashable, Iterable, Iterator

from .showing import shown

log = logging.getLogger(__name__)


@shown
@dataclasses.dataclass
class Tally:
    """The calls of one function: how many, how many failed, and the first that did, in words."""

    calls: int = 0
    failed: int = 0
    first: str = ""
    error: BaseException | None = None

    def add(self, other: Tally) -> None:
        """Both together."""
        if not self.failed:
            self.first, self.error = other.first, other.error
        self.calls += other.calls
        self.failed += other.failed


_lock = threading.Lock()
_running: dict[Hashable, int] = {}
"""How many runs, in whatever threads, have the function now."""
_tallies: dict[Hashable, Tally] = {}
"""Of functions that have failed since their runs began, or since the last one."""


def report(function: Hashable, tally: Tally) -> None:
    """Add a batch of calls; `function` is what runs know it by."""
    with _lock:
        running = function in _running
        if running:
            _tallies.setdefault(function, Tally()).add(tally)
            return
        said = function in _tallies
        if tally.failed:
            # Without the error, whose traceback would keep the frames alive.
            _tallies.setdefault(function, Tally())
    if tally.failed and not said:
        _say(tally, " so far, and later failures are not said")


@contextlib.contextmanager
def said_once(functions: Iterable[Hashable]) -> Iterator[None]:
    """A run with these functions: what they did wrong is said when it ends, once for each."""
    functions = set(functions)
    with _lock:
        for function in functions:
            if function not in _running:
                _tallies.pop(function, None)
            _running[function] = _running.get(function, 0) + 1
    try:
        yield
    finally:
        ended = []
        with _lock:
            for function in functions:
                _running[function] -= 1
                if not _running[function]:
                    del _running[function]
                    ended.append(_tallies.pop(function, Tally()))
        for tally in ended:
            if tally.failed:
                _say(tally, "")


@dataclasses.dataclass(eq=False)
class _Hearing:
    """A block that would hear of an interrupt: of which thread, and whether one came."""

    thread: int
    came: bool = False


_hearing: set[_Hearing] = set()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A program that calls functions on the host, waited for inside: an interrupt (Ctrl-C) that
    reaches one of them ends the program soon, with a result that means nothing, and is raised here,
    as a KeyboardInterrupt.
    """
    own = _Hearing(threading.get_ident())
    with _lock:
        _hearing.add(own)
    try:
        yield
    finally:
        with _lock:
            _hearing.remove(own)
            if own.came:  # Blocks around this one are told by what is raised.
                for outer in _hearing:
                    outer.came &= outer.thread != own.thread
    if own.came:
        raise KeyboardInterrupt


def interrupted(now: bool = False) -> bool:
    """Whether programs are to end for an interrupt, which comes `now`, or came before; False if
    nobody hears of it.

    A function on the host does not know whose program calls it: all that run are to end.
    """
    with _lock:
        came = bool(_hearing) and (now or any(block.came for block in _hearing))
        for block in _hearing:
            block.came |= came
        return came


def _say(tally: Tally, where: str) -> None:
    log.warning(
        "%s; that string gets weight 0.  It failed in %d of %d calls%s.",
        tally.first,
        tally.failed,
        tally.calls,
        where,
        exc_info=tally.error,
    )
