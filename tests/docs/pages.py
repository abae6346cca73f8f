"""The pages of `docs`, read without the generator of the site."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"


class Row(NamedTuple):
    """A row of the table of tasks in docs/choosing.md."""

    task: str
    anchor: str
    function: str
    guarantee: str


def hook() -> ModuleType:
    """docs/generated.py, which writes the other pages."""
    spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_code(text: str) -> str:
    """A page without its blocks and spans of code, in which a bracket is no link."""
    return re.sub(r"`[^`\n]*`", "``", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def links(text: str) -> list[str]:
    """The targets of all links and pictures of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def anchors(text: str) -> set[str]:
    """The anchors of all headings of a page."""
    code = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", code, re.M)}


def blocks(text: str) -> list[str]:
    """The Python of a page that is to be run."""
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def rows(text: str) -> list[Row]:
    """The table of tasks."""
    cells = r"^\| \[([^]]+)\]\(#([^)]+)\) \| `([^`]+)` \| (\w+) \| .+ \|$"
    return [Row(*found) for found in re.findall(cells, text, re.M)]


def sections(text: str) -> dict[str, str]:
    """The Python below every heading of the third level, by the heading's anchor."""
    parts = re.split(r"^### (.*)$", text, flags=re.M)
    return {
        slug(title): "".join(blocks(body))
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }
