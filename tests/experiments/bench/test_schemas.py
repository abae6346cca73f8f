"""JSON schemas as people write them, with jsonschema as the referee."""

from __future__ import annotations

import pytest

from experiments.bench.schemas import cases, judging
from ppl import schemas
from ppl.schemas import formats

CASES = cases.load()


@pytest.fixture
def forgetful():
    """What is remembered of schemas is forgotten before and after."""
    for cached in (schemas._plan, schemas._ready, schemas._grammar):
        cached.cache_clear()
    yield
    for cached in (schemas._plan, schemas._ready, schemas._grammar):
        cached.cache_clear()


def of(name: str) -> cases.Case:
    return next(case for case in CASES if case.name == name)


def test_there_are_enough():
    assert len(CASES) >= 200 and len({case.name for case in CASES}) == len(CASES)
    assert all(case.valid for case in CASES) and sum(not case.invalid for case in CASES) < 5


@pytest.mark.parametrize("case", CASES[::20], ids=lambda case: case.name)
def test_documents_and_walks_are_right(case):
    verdict = judging.judge(case, num_walks=3, seed=1)
    assert verdict.problems == []
    assert verdict.way == "refused" or verdict.walked == 3


@pytest.mark.usefixtures("forgetful")
def test_a_planted_fault_is_found(monkeypatch):
    monkeypatch.setitem(formats.STRINGS, "time", r"[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
    problems = judging.judge(of("time"), num_walks=20, seed=0).problems
    assert any("valid, and mass is False" in problem for problem in problems)
    assert any("a walk wrote" in problem for problem in problems)


def test_what_nothing_enforces_is_refused():
    verdict = judging.judge(of("contains"), num_walks=1, seed=0)
    assert verdict.way == "refused" and "contains" in verdict.why


@pytest.mark.slow
def test_coverage():
    found = [judging.judge(case, num_walks=15, seed=2) for case in CASES]
    assert [verdict for verdict in found if verdict.problems] == []
    assert sum(verdict.way == "refused" for verdict in found) <= 0.05 * len(found)
    walked, unended = (sum(v[i] for v in found) for i in (5, 6))
    assert unended < 0.01 * walked
