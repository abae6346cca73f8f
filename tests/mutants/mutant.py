"""A mutant: one file with one piece of text replaced by another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("ppl", "samplers")
"""What is mutated."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`file` with `old` replaced by `new` from character `start` on.

    what: in words.  place: the function that it is in.
    """

    file: str
    what: str
    place: str
    start: int
    old: str
    new: str

    def source(self, root: Path = ROOT) -> str:
        """The whole file, mutated."""
        text = (root / self.file).read_text()
        end = self.start + len(self.old)
        if text[self.start : end] != self.old:
            raise ValueError(f"expected {self.old!r} at {self.start} of {self.file}, which changed")
        return text[: self.start] + self.new + text[end:]

    @property
    def line(self) -> int:
        return (ROOT / self.file).read_text().count("\n", 0, self.start) + 1

    @property
    def name(self) -> str:
        """What a person reads: where, and what became what."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}:{self.line} {self.place}: {self.what}: {old} -> {new or 'nothing'}"


def files() -> list[str]:
    """Every module that may be mutated, in order."""
    found = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return [str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py"]
