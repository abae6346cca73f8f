"""JSON schemas as what a constraint is built of: a regular expression where that is right and
small, else a grammar for llguidance.

A schema is read into forms (`reading`, `shapes`, `formats`, `patterns`), which are made ready to be
written (`logic`, `closing`) and written in one of two ways (`tables`, `grammars`).  A keyword that
none of them enforces is refused by name.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

from ..showing import shown
from . import closing, grammars, reading, tables
from .forms import Refused

__all__ = ["Plan", "Refused", "plan"]


@shown
class Plan(NamedTuple):
    """How a schema becomes a constraint.

    pattern: a regular expression of its texts, or None; why: what keeps it from being one.
    """

    schema: str
    pattern: str | None
    why: str

    def grammar(self, why: str | None = None) -> str:
        """A grammar of its texts.

        Raises:
            Refused: if llguidance cannot enforce the schema.
        """
        return _grammar(self.schema, why or self.why)

    def counts_names(self) -> bool:
        """Whether it takes different names of free properties, which a grammar cannot tell."""
        return any(map(closing.counts_names, _ready(self.schema).all()))


def plan(schema: Any) -> Plan:
    """The way of a schema, a dict, bool or JSON text.

    Raises:
        Refused: naming path, what was expected, what came and the remedy.
        ValueError: if the text is no JSON.
    """
    value = reading.parse(schema) if isinstance(schema, str) else schema
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"expected a JSON schema as a dict of JSON values, got one that is none: {error};"
            " write it as JSON"
        ) from None
    return _plan(text)


@functools.lru_cache(maxsize=256)
def _plan(text: str) -> Plan:
    ready = _ready(text)
    try:
        pattern = tables.write(ready)
    except tables.Beyond as error:
        return Plan(text, None, str(error))
    if not pattern:
        raise closing.refused("#", "a schema that some value fits", "one of none", "loosen it")
    return Plan(text, pattern, "")


@functools.lru_cache(maxsize=256)
def _ready(text: str) -> closing.Ready:
    form, definitions = reading.read(reading.parse(text))
    return closing.ready(form, definitions)


@functools.lru_cache(maxsize=256)
def _grammar(text: str, why: str) -> str:
    return grammars.write(_ready(text), why)
