"""The spline against flowjax's, which has the same parameters."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.bijections import RationalQuadraticSpline
from paramax import unwrap

from amortized.posteriors.splines import Spline

KNOTS, INTERVAL = 6, 2.5


def pair(key: jax.Array) -> tuple[Spline, RationalQuadraticSpline]:
    """Ours and theirs, of the same random parameters."""
    ours, theirs = (of(knots=KNOTS, interval=INTERVAL) for of in (Spline, RationalQuadraticSpline))
    leaves, tree = jax.tree.flatten(eqx.filter(ours, eqx.is_inexact_array))
    keys = jax.random.split(key, len(leaves))
    new = [2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    ours = eqx.combine(jax.tree.unflatten(tree, new), ours)
    arrays, rest = eqx.partition(theirs, eqx.is_inexact_array)
    assert [leaf.shape for leaf in jax.tree.leaves(arrays)] == [leaf.shape for leaf in new]
    return ours, unwrap(eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), new), rest))


@pytest.mark.parametrize("way", ["transform_and_log_det", "inverse_and_log_det"])
def test_it_is_the_map_of_flowjax(way: str):
    ours, theirs = pair(jax.random.key(0))
    edges = [-INTERVAL, INTERVAL, -3.0, 3.0, 0.0]
    values = jnp.concatenate([jnp.linspace(-2.6, 2.6, 200), jnp.array(edges)])
    found = jax.vmap(getattr(ours, way))(values)
    wanted = jax.vmap(getattr(theirs, way))(values)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_there_and_back_with_the_slope_of_the_curve():
    ours, _ = pair(jax.random.key(1))
    x = jnp.linspace(-3, 3, 101)
    y, log_det = jax.vmap(ours.transform_and_log_det)(x)
    back, back_log_det = jax.vmap(ours.inverse_and_log_det)(y)
    np.testing.assert_allclose(back, x, atol=2e-5)
    np.testing.assert_allclose(back_log_det, -log_det, atol=1e-3)
    slope = jax.vmap(jax.grad(lambda x: ours.transform_and_log_det(x)[0]))(x)
    np.testing.assert_allclose(jnp.log(slope), log_det, atol=1e-4)
    assert (jnp.diff(y) > 0).all()


def test_it_begins_as_the_identity():
    y, log_det = jax.vmap(Spline(knots=KNOTS, interval=INTERVAL).transform_and_log_det)(
        jnp.linspace(-3, 3, 31)
    )
    np.testing.assert_allclose(y, jnp.linspace(-3, 3, 31), atol=1e-6)
    np.testing.assert_allclose(log_det, 0, atol=1e-5)
