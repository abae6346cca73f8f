"""Six constrained targets for a small chat model: how much the constraint decides, and how late,
differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ppl
from ppl.lm import LM
from ppl.target import Target

MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
CAT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One target: what is asked, what an answer must be, and its horizon."""

    prompt: str
    constraint: Callable[[Any], ppl.Potential]
    max_tokens: int


def _regex(pattern: str) -> Callable[[Any], ppl.Potential]:
    return lambda tokenizer: ppl.regex(pattern, tokenizer)


KINDS = {
    "date": Kind(
        "Name a famous date in history. Answer with the date only.",
        _regex(rf"({MONTHS}) [1-9][0-9]?, [12][0-9]{{3}}"),
        24,
    ),
    "JSON": Kind(
        "Describe a cat as JSON, with its name and its age.",
        lambda tokenizer: ppl.json_schema(CAT, tokenizer),
        24,
    ),
    "ISO date": Kind(
        "On which day did people first walk on the moon? Answer as YYYY-MM-DD.",
        _regex(r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"),
        16,
    ),
    "number": Kind(
        "How many people live in France? Answer with a number only.",
        _regex(r"[1-9][0-9]{0,2}(,[0-9]{3}){1,3}"),
        16,
    ),
    "reason": Kind(
        "Is the sun a star? Answer with yes or no and a reason.",
        _regex(r"(Yes|No), because [a-z ]{8,60}\."),
        24,
    ),
    "list": Kind(
        "List three fruits, separated by commas.",
        _regex(r"[A-Z]?[a-z]{3,10}, [a-z]{3,10}, (and )?[a-z]{3,10}\.?"),
        20,
    ),
}


def target(name: str, alpha: float, lm: LM, tokenizer: Any) -> Target:
    """p^alpha times the constraint."""
    kind = KINDS[name]
    p = lm.given(tokenizer.chat(kind.prompt), max_tokens=kind.max_tokens)
    return (p if alpha == 1 else p**alpha) * kind.constraint(tokenizer)
