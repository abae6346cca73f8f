"""Classes with the same fields are different structures, and jit never takes one for the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.pytrees import register_dataclass


def make(register: Callable[[type], type], scale: float) -> Any:
    """An object of a class of its own, which multiplies by `scale`."""

    @register
    @dataclasses.dataclass(frozen=True)
    class Scale:
        weight: Any
        power: int = dataclasses.field(default=1, metadata={"static": True})

        def __call__(self, x: Any) -> Any:
            return scale * self.weight**self.power * x

    return Scale(jnp.float32(2))


@pytest.mark.slow
def test_jit_tells_classes_apart():
    """With jax's own decorator about one call in seven runs another class's program (jax 0.10)."""
    call = jax.jit(lambda f, x: f(x))
    found = [float(call(make(register_dataclass, k), 1.0)) for k in range(100)]
    np.testing.assert_array_equal(found, 2.0 * np.arange(100))


def test_structures_are_of_a_class_and_its_static_fields():
    a, b = make(register_dataclass, 1.0), make(register_dataclass, 1.0)
    assert jax.tree.structure(a) != jax.tree.structure(b)
    assert jax.tree.structure(a) == jax.tree.structure(dataclasses.replace(a, weight=5.0))
    assert jax.tree.structure(a) != jax.tree.structure(dataclasses.replace(a, power=2))


def test_it_is_a_pytree():
    a = make(register_dataclass, 1.0)
    again = jax.tree.map(lambda x: x + 1, a)
    assert type(again) is type(a) and float(again.weight) == 3 and again.power == 1
    [(path, leaf)] = jax.tree_util.tree_leaves_with_path(a)
    assert jax.tree_util.keystr(path) == ".weight" and float(leaf) == 2
    assert jax.tree.map(lambda _: None, a, is_leaf=lambda x: x is not a).weight is None


def test_rebuilding_does_not_run_the_checks_of_the_constructor():
    steps = ppl.Steps(delimiters=[3])
    assert jax.tree.structure(steps).unflatten([None]).delimiters is None


def test_products_of_the_library_differ():
    """Both hold a scorer, steps and an end-of-string token."""
    score = lambda tokens, length: 0.1 * length  # noqa: E731
    steps = ppl.Steps(every=2)
    structures = [jax.tree.structure(f(score, steps)) for f in (ppl.step_scores, ppl.step_factors)]
    assert structures[0] != structures[1]


@pytest.mark.bad_input
def test_what_is_no_dataclass_is_refused():
    with pytest.raises(ValueError, match="expected a dataclass, got int"):
        register_dataclass(int)
