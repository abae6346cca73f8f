"""One schema's verdict: its way, and what is wrong."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ppl import schemas

from . import walks
from .cases import Case
from .referee import referee


class Verdict(NamedTuple):
    """way: "tables", "parser" or "refused", and why it is not the one before."""

    name: str
    way: str
    why: str
    problems: list[str]
    documents: int = 0
    walked: int = 0
    unended: int = 0


def text(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False)


def judge(case: Case, num_walks: int, seed: int) -> Verdict:
    """Documents, and random walks, by the referee."""
    valid = referee(case.schema)
    try:
        plan = schemas.plan(case.schema)
        constraint = walks.constraint(plan)
    except ValueError as error:
        return Verdict(case.name, "refused", str(error), [])
    problems = []
    listed = [(one, True) for one in case.valid] + [(one, False) for one in case.invalid]
    for document, said in listed:
        right, found = valid(text(document)), walks.accepts(constraint, text(document))
        if right != said:
            problems.append(f"the referee disagrees with the case about {text(document)}")
        if right != found:
            problems.append(f"{'valid' if right else 'invalid'}, and mass is {found}: {document!r}")
    texts, unended = walks.walks(constraint, num_walks, seed)
    problems += [f"a walk wrote {one!r}" for one in texts if not valid(one)]
    way = "parser" if plan.pattern is None else "tables"
    return Verdict(case.name, way, plan.why, problems, len(listed), len(texts), unended)
