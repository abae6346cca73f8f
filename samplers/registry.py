"""Every public sampler with its guarantee and the tests that prove it.

`python -m samplers.registry` prints the list.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import pkgutil
import re
from collections.abc import Callable
from typing import Any, TypeVar

from ppl.showing import shown

from .base import Guarantee
from .calling import public

F = TypeVar("F", bound=Callable[..., Any])


@shown
@dataclasses.dataclass(frozen=True)
class Entry:
    """A sampler: its name (module and function), what it promises, and where that is tested."""

    name: str
    guarantee: Guarantee
    proof: str
    function: Callable[..., Any]

    @property
    def purpose(self) -> str:
        """What it is for: the first sentence of its docstring."""
        first = (self.function.__doc__ or "").partition("\n\n")[0]
        return re.split(r"(?<=[^.]\.)\s+(?=[A-Z])", " ".join(first.split()))[0]


_entries: dict[str, Entry] = {}


def sampler(guarantee: Guarantee, *, proof: str) -> Callable[[F], F]:
    """Decorator that lists a public sampler; `proof` is the test file that enumerates it.

    It is called as `calling.public` says.
    """

    def register(function: F) -> F:
        name = f"{function.__module__}.{function.__qualname__}"
        called = public(function)
        _entries[name] = Entry(name, guarantee, proof, called)
        return called

    return register


def entries() -> list[Entry]:
    """All public samplers of this package, by name."""
    for module in pkgutil.walk_packages([str(pathlib.Path(__file__).parent)], "samplers."):
        importlib.import_module(module.name)
    # Other packages, where they are imported, list theirs too.
    own = [entry for entry in _entries.values() if entry.name.startswith("samplers.")]
    return sorted(own, key=lambda entry: entry.name)


def promise(function: Callable[..., Any]) -> Guarantee | None:
    """What a sampler of any package that has been imported promises; None of another function."""
    found = [entry.guarantee for entry in _entries.values() if entry.function is function]
    return found[0] if found else None


if __name__ == "__main__":
    # Not `entries()`: the decorators write to samplers.registry, which is not this __main__.
    for entry in importlib.import_module("samplers.registry").entries():
        name = entry.name.removeprefix("samplers.")
        print(f"{name:36} {entry.guarantee.name:11} {entry.purpose}\n{'':48} {entry.proof}")
    print(*(f"\n{guarantee.name}: {guarantee.value}" for guarantee in Guarantee), sep="")
