"""The mutants themselves: they fit the code, are the same for a seed, and each has tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants import __main__ as command
from tests.mutants import operators
from tests.mutants.belonging import tests_of as belonging_to
from tests.mutants.catalogue import EQUIVALENT, exact
from tests.mutants.mutant import ROOT, Mutant, files
from tests.mutants.running import Ledger, Verdict

SMALL = '''"""Text 1 + 1."""

import jax


def f(key, other_key, x: int = 3, *, limit: float = 0.5):
    """Returns 1 + 1."""
    if x < 0:
        raise ValueError(f"expected {x + 1}")
    y = jax.numpy.where(x > limit, x - 1, -x)
    y = g(y, rows=x, dtype=int)
    return draw(key, y) & ~y
'''
MADE = {
    "off by one": ["(1)", "(2)"],
    "turned round": ["(x >= 0)", "(x <= limit)"],
    "sign turned": ["(x + 1)"],
    "term dropped": ["(x)"],
    "branches swapped": ["(jax.numpy.where(x > limit, -x, x - 1))"],
    "choice dropped": ["(x - 1)", "(-x)"],
    "negation dropped": ["(x)", "(y)"],
    "step left out": ["pass"],
    "rows left out": ["(g(y, dtype=int))"],
    "wrong key": ["other_key"],
    "and/or": ["(draw(key, y) | ~y)"],
    "condition dropped": ["(draw(key, y))", "(~y)"],
}


@pytest.fixture
def small(tmp_path: Path) -> list[Mutant]:
    (tmp_path / "small.py").write_text(SMALL)
    return operators.mutants_of("small.py", tmp_path)


def test_operators_change_the_mathematics_and_leave_the_words(small: list[Mutant], tmp_path: Path):
    found: dict[str, list[str]] = {}
    for mutant in small:
        found.setdefault(mutant.what, []).append(mutant.new)
        assert mutant.place == "f" and mutant.source(tmp_path) != SMALL
        ast.parse(mutant.source(tmp_path))
    assert {what: sorted(new) for what, new in found.items()} == {
        what: sorted(new) for what, new in MADE.items()
    }


def test_the_catalogue_fits_the_code():
    """Each text is there exactly once, and what stands in its place can be compiled."""
    mutants = exact()
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in mutants}) == len(mutants) > 60
    for mutant in mutants:
        compile(mutant.source(), mutant.file, "exec")


def test_a_sample_is_the_same_for_its_seed():
    first, again, other = (command.sample(40, seed, "") for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 40
    assert sum(mutant.place == "catalogue" for mutant in first) == 20
    longer = command.sample(60, 0, "")
    made = [mutant for mutant in first if mutant.place != "catalogue"]
    assert set(made) <= set(longer)
    assert all(mutant.file.startswith("ppl/") for mutant in command.sample(10, 0, "ppl/"))


def test_every_module_has_tests_its_own_among_the_first():
    for file in files():
        tests = belonging_to(file)
        assert tests and all((ROOT / test).exists() for test in tests), file
        mirrored = f"tests/{Path(file).parent}/test_{Path(file).name}"
        assert not (ROOT / mirrored).exists() or mirrored in tests[:3], file


def test_equivalent_mutants_are_still_made():
    """A mutant that is said to change nothing, and is made no more, is to be struck out."""
    made = {file: operators.mutants_of(file) for file, *_ in EQUIVALENT}
    known = {(m.file, m.place, m.old, m.new) for found in made.values() for m in found}
    assert EQUIVALENT.keys() <= known


def test_verdicts_are_kept(tmp_path: Path):
    ledger = Ledger(tmp_path / "verdicts.jsonl")
    digest = Ledger.digest("text", ("tests/mutants/test_mutants.py",), ("fast",))
    assert ledger.get(digest) is None
    ledger.add(digest, "a mutant", Verdict("caught", "fast", 1.5, "by"))
    assert Ledger(tmp_path / "verdicts.jsonl").get(digest) == Verdict("caught", "fast", 1.5, "by")
    assert digest != Ledger.digest("text", ("tests/mutants/test_mutants.py",), ("fast", "slow"))
