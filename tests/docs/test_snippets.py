"""The Python of the pages runs, on a model small enough for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import pytest

import models
from models import tabular
from samplers import registry

from ..experiments import tiny
from . import pages

pytestmark = pytest.mark.slow


CHOOSING = (pages.DOCS / "choosing.md").read_text()
START, *_ = pages.blocks(CHOOSING)
SECTIONS = pages.sections(CHOOSING)
GUIDES = [page.stem for page in sorted(pages.DOCS.glob("*.md")) if page.stem != "choosing"]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the snippets start from, with a Markov chain of 96 characters as the model."""
    lm, tok = models.load(tiny.write(tmp_path_factory.mktemp("docs") / "model"))
    chain = tabular.random_markov(jax.random.key(1), lm.vocab_size, eos=lm.eos)
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda name: (chain, tok))
        exec(compile(START, "choosing", "exec"), found)
    return found


def run(code: str, names: dict[str, Any], place: str) -> dict[str, Any]:
    """Run a snippet, and give back its names."""
    # An example's size is that of a real run, and a chain has no layers to adapt.
    code = re.sub(r"num_samples=1000\b", "num_samples=20", code)
    code = re.sub(r"num_steps=300\b", "num_steps=2", code)
    code = re.sub(r"num_simulations=\d+\b", "num_simulations=20", code)
    code = re.sub(r"guide\.lora\(.*?\)", "guide.full(lm)", code)
    inside = dict(names)
    exec(compile(code, place, "exec"), inside)
    return inside


@pytest.mark.parametrize("row", pages.rows(CHOOSING), ids=lambda row: row.anchor)
def test_a_task(
    row: pages.Row, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its snippet calls the function of its row, whose guarantee is the registry's."""
    monkeypatch.chdir(tmp_path)
    inside = run(SECTIONS[row.anchor], names, row.task)
    assert f"{row.function}(" in SECTIONS[row.anchor]
    function = eval(row.function, inside)
    promised = registry.promise(function)
    without = row.guarantee in ("enumerated", "any", "unbiased", "optimal", "controlled")
    assert (promised is None) if without else (promised and promised.name == row.guarantee)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide(
    guide: str,
    names: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    run("".join(pages.blocks((pages.DOCS / f"{guide}.md").read_text())), names, guide)
