"""Every public sampler is listed with a guarantee and a proof that exists."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import samplers
from samplers import registry
from samplers.base import Guarantee

ROOT = Path(__file__).parents[2]


def public_runs() -> dict[str, object]:
    """Every `run(key, target, ...)` of a module of samplers."""
    found = {}
    for module in pkgutil.walk_packages(samplers.__path__, "samplers."):
        run = getattr(importlib.import_module(module.name), "run", None)
        if run is not None and "target" in inspect.signature(run).parameters:
            found[f"{run.__module__}.run"] = run
    return found


def test_every_public_run_is_listed():
    listed = {entry.name: entry.function for entry in registry.entries()}
    runs = public_runs()
    some = {"smc.sequential", "draws.ancestral", "smc.importance", "search.best_of_n"}
    assert {f"samplers.{name}.run" for name in some} <= set(runs)
    missing = sorted(set(runs) - set(listed))
    assert not missing, f"no @sampler on {missing}"


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_every_proof_exists_and_tests_its_sampler(entry: registry.Entry):
    proof = (ROOT / entry.proof).read_text()
    *_, module, function = entry.name.split(".")
    module = "smc" if module == "sequential" else module
    assert f"{module}.{function}(" in proof or f" {module}" in proof
    assert "def test_" in proof
    assert isinstance(entry.guarantee, Guarantee)
    assert 20 < len(entry.purpose) < 150 and entry.purpose.endswith((".", ";")), entry.purpose


def test_a_heuristic_says_that_it_has_no_target():
    for entry in registry.entries():
        if entry.guarantee is Guarantee.HEURISTIC:
            assert "no target" in (entry.function.__doc__ or ""), entry.name
