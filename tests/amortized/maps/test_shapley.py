"""Shapley values: the sum over all coalitions, the regression that has them as its optimum, and the
network that learns them.
"""

from __future__ import annotations

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amortized import fit
from amortized.maps import shapley

KEY = jax.random.key(4)
D = 5
RANDOM = np.random.default_rng(3).normal(size=2**D)
"""A game of five players without any structure."""
POWERS = jnp.array([2**i for i in range(D)], jnp.int32)


def game(coalition):
    return jnp.asarray(RANDOM, jnp.float32)[(coalition * POWERS).sum()]


def by_orders(values, d):
    """The definition: what a player adds, the mean over all orders."""
    phi = np.zeros(d)
    for order in itertools.permutations(range(d)):
        seen = 0
        for i in order:
            phi[i] += values[seen | 1 << i] - values[seen]
            seen |= 1 << i
    return phi / math.factorial(d)


TRUTH = by_orders(RANDOM, D)


def test_exact_is_the_mean_over_all_orders():
    np.testing.assert_allclose(shapley.exact(game, D), TRUTH, atol=1e-6)


def test_exact_of_a_linear_model():
    key, other = jax.random.split(KEY)
    b, x = jax.random.normal(key, (2, 12))
    mean = jax.random.normal(other, (12,))
    found = shapley.exact(lambda s: shapley.Masked(lambda x: b @ x, mean)(x, s), 12)
    np.testing.assert_allclose(found, b * (x - mean), atol=1e-5)


def test_one_player_has_it_all():
    np.testing.assert_allclose(shapley.exact(lambda s: jnp.where(s[0], 3.0, 1.0), 1), [2.0])


def test_the_kernel_and_its_pairs():
    drawn = np.asarray(shapley.coalitions(KEY, 40_000, D))
    np.testing.assert_array_equal(drawn[:40_000], ~drawn[40_000:])
    counts = np.bincount((drawn[:40_000] * np.asarray(POWERS)).sum(1), minlength=2**D)
    sizes = np.array([bin(s).count("1") for s in range(2**D)])
    law = [0 if k in (0, D) else (D - 1) / (math.comb(D, k) * k * (D - k)) for k in sizes]
    law = np.array(law) / sum(law)
    assert counts[0] == counts[-1] == 0
    z = (counts - 40_000 * law)[1:-1] / np.sqrt(40_000 * law * (1 - law))[1:-1]
    assert np.abs(z).max() < 5


class Constant(eqx.Module):
    """An explainer of a single input, which can give any numbers."""

    phi: jax.Array

    def __call__(self, x):
        return self.phi


def whole_kernel():
    """All proper coalitions as often as the kernel has them: 3 to 1 for D = 5."""
    members = (np.arange(2**D)[:, None] >> np.arange(D)) & 1 == 1
    often = np.where(np.isin(members.sum(1), (1, D - 1)), 3, 1)
    rows = np.repeat(np.arange(2**D), often * (members.any(1) & ~members.all(1)))
    gains = (RANDOM - RANDOM[0]).astype(np.float32)
    batch = shapley.Games(
        jnp.zeros((1, 1), jnp.float32),
        jnp.asarray(members[rows])[None],
        jnp.asarray(gains[rows])[None],
        jnp.asarray(gains[-1:]),
    )
    return batch, members[rows], gains[rows]


def test_the_loss_is_least_at_the_shapley_values_and_without_the_constraint_elsewhere():
    batch, members, gains = whole_kernel()

    def value(phi):
        return shapley.loss(Constant(phi), KEY, batch)[0]

    start = jnp.zeros(D, jnp.float32)
    # A quadratic: one step from anywhere.  What is added to all players does not matter.
    slope, curvature = jax.jit(lambda phi: (jax.grad(value)(phi), jax.hessian(value)(phi)))(start)
    step, *_ = np.linalg.lstsq(curvature, -slope, rcond=1e-5)
    found = shapley.additive(jnp.asarray(step), batch.total[0])
    np.testing.assert_allclose(found, TRUTH, atol=2e-6)
    assert value(start + 1) == pytest.approx(value(start))
    free, *_ = np.linalg.lstsq(members.astype(float), gains.astype(float), rcond=None)
    total = RANDOM[-1] - RANDOM[0]
    assert np.abs(free - TRUTH).max() > 0.02
    assert np.abs(free * total / free.sum() - TRUTH).max() > 0.02
    again = shapley.additive(jnp.asarray(free, jnp.float32), jnp.float32(total))
    np.testing.assert_allclose(again, TRUTH, atol=2e-6)


def test_a_step_has_the_games_of_its_inputs():
    value = shapley.Masked(lambda x: x[0] * x[1] + 3.0, jnp.array([1.0, 2.0]))
    rows = jax.random.normal(KEY, (7, 2))
    training = shapley.training(KEY, value, rows, num_pairs=2, batch_size=3)
    games, _ = eqx.filter_jit(training.draw)(KEY, training.params, None)
    assert games.coalitions.shape == (3, 4, 2)
    ends = jax.vmap(lambda x: x[0] * x[1])(games.x) - 2
    np.testing.assert_allclose(games.total, ends, rtol=1e-5)
    seen = jnp.where(games.coalitions, games.x[:, None], value.baseline)
    np.testing.assert_allclose(games.gains, seen.prod(2) - 2, rtol=1e-5)


def test_a_network_learns_the_values_of_every_input():
    def model(x):
        return 2 * x[0] * x[1] - x[1] + jnp.sin(2 * x[2])

    value = shapley.Masked(model, jnp.array([0.5, 0.2, -0.3]))
    rows = jax.random.normal(KEY, (500, 3))
    training = shapley.training(KEY, value, rows)
    out = fit.run(KEY, training, optimizer=optax.adam(2e-3), num_steps=600, progress=False)
    explain = shapley.explainer(out, value)
    some = rows[:50]
    truth = jax.jit(jax.vmap(lambda x: shapley.exact(lambda s: value(x, s), 3)))(some)
    found = jax.jit(jax.vmap(explain))(some)
    np.testing.assert_allclose(
        found.sum(1), jax.vmap(model)(some) - model(value.baseline), atol=1e-4
    )
    assert np.mean((found - truth) ** 2) < 0.01 * np.mean(truth**2)


def test_bad_input():
    with pytest.raises(ValueError, match="at most 12 players.*d=13.*shapley.training"):
        shapley.exact(game, 13)
    with pytest.raises(ValueError, match=r"expected a number .* got shape \(5,\)"):
        shapley.exact(lambda s: s.astype(jnp.float32), 5)
    rows = jnp.zeros((4, 2, 2))
    with pytest.raises(ValueError, match=r"one array \[N, D\].*\(4, 2, 2\)"):
        shapley.training(KEY, lambda x, s: x.sum(), rows)
    with pytest.raises(ValueError, match="at least two players, got 1"):
        shapley.training(KEY, lambda x, s: x.sum(), rows[:, 0, :1])
    with pytest.raises(ValueError, match=r"got shape \(2,\)"):
        shapley.training(KEY, lambda x, s: x, rows[:, 0])
