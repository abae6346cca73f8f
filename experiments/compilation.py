"""JAX's compilation on this machine: kept between processes, and timed apart from the work."""

from __future__ import annotations

import threading
from typing import Any

import jax
from jax import monitoring

from models.download import cache_directory

_EVENTS = "/jax/core/compile/"


def use_cache() -> None:
    """Keep compiled programs in the user's cache directory (`TILTLM_CACHE`), unless JAX was already
    given a place.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    # Dozens of small programs surround the large ones; together they take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


class _Clock:
    """Seconds that this process has spent tracing, lowering and compiling (or fetching what was
    compiled before).
    """

    def __init__(self) -> None:
        self.seconds, self._lock = 0.0, threading.Lock()
        monitoring.register_event_duration_secs_listener(self._record)

    def _record(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(_EVENTS):
            with self._lock:
                self.seconds += duration_secs


_clock = _Clock()


def seconds_so_far() -> float:
    """Seconds spent on compilation since this module was imported; differences time a piece of
    work.
    """
    return _clock.seconds
