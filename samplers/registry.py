"""Every public sampler with its guarantee and the tests that prove it.

`python -m samplers.registry` prints the list.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from .base import Guarantee

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Entry:
    """A sampler: its name (module and function), what it promises, and where that is tested."""

    name: str
    guarantee: Guarantee
    proof: str
    function: Callable[..., Any]


_entries: dict[str, Entry] = {}


def sampler(guarantee: Guarantee, *, proof: str) -> Callable[[F], F]:
    """Decorator that lists a public sampler; `proof` is the test file that enumerates it."""

    def register(function: F) -> F:
        name = f"{function.__module__}.{function.__qualname__}"
        _entries[name] = Entry(name, guarantee, proof, function)
        return function

    return register


def entries() -> list[Entry]:
    """All public samplers, by name."""
    import samplers

    for module in pkgutil.iter_modules(samplers.__path__, "samplers."):
        importlib.import_module(module.name)
    return sorted(_entries.values(), key=lambda entry: entry.name)


if __name__ == "__main__":
    from samplers import registry  # the module the decorators write to is not __main__

    for entry in registry.entries():
        print(f"{entry.name:36} {entry.guarantee.name:11} {entry.guarantee.value}\n{'':36} proof: {entry.proof}")
