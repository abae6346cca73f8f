"""The value of another draw: against dynamic programming, and the best number by brute force."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from samplers.search import laws, worth

VALUES, PROBS = np.array([0.0, 0.3, 0.5, 1.0]), np.array([0.4, 0.3, 0.2, 0.1])
CAP = 30


def stops(rule: Any, best: float) -> bool:
    seen = rule.init(1, CAP)
    seen = rule.step(seen, jnp.int32(0), jnp.float32(best))
    # What is worse than the best changes nothing.
    return bool(rule.decide(rule.step(seen, jnp.int32(0), jnp.float32(-1.0))))


@pytest.mark.parametrize("price", [0.01, 0.06, 0.12, 0.3])
def test_no_rule_does_better(price: float):
    """The utility of the rule, and the most there is, of at most CAP draws."""
    rule = worth.rule(VALUES, PROBS, price=price)
    stop = np.array([stops(rule, v) for v in VALUES])
    index = np.arange(len(VALUES))
    after = np.maximum(index[:, None], index)  # the best once another is drawn
    most = ours = VALUES.copy()
    for _ in range(CAP):
        most = np.maximum(VALUES, most[after] @ PROBS - price)
        ours = np.where(stop, VALUES, ours[after] @ PROBS - price)
    np.testing.assert_allclose(ours, most, atol=1e-6)
    assert not bool(rule.decide(rule.init(1, CAP))) and stop[-1]


@pytest.mark.parametrize("price", [0.005, 0.02, 0.05, 0.5])
def test_the_number_that_is_planned_is_the_best(price: float):
    rows = np.tile(PROBS, (CAP, 1))
    utility = [laws.expected_max(rows[:n], VALUES) - n * price for n in range(1, CAP + 1)]
    assert worth.planned(rows, VALUES, np.full(CAP, price)) == 1 + int(np.argmax(utility))


def test_prices_and_laws_may_differ():
    rows = np.array([[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    values = np.array([0.0, 1.0])
    # Gains of 1/4 and 1/4.
    assert worth.planned(rows, values, np.array([0.9, 0.2, 0.3])) == 2
    assert worth.planned(rows, values, np.array([0.9, 0.2, 0.2])) == 3
    assert worth.planned(rows, values, np.array([0.9, 0.3, 0.0])) == 1


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="a probability for each of 4 values and a price from 0"):
        worth.rule(VALUES, PROBS, price=-0.1)
    with pytest.raises(ValueError, match="expected a price for each of 2 draws, got 1"):
        worth.planned(np.array([[1.0], [1.0]]), np.array([1.0]), np.array([0.1]))
