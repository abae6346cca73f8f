"""Ctrl-C as a wish to stop at the next good place."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any


class Interrupts:
    """While it is entered, the first Ctrl-C sets `asked`, and a second one raises."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        # Another handler than Python's own knows what it does, and only the main thread may set
        # one.
        mine = threading.current_thread() is threading.main_thread()
        self._set = mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._set:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._set:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
