"""Every family is a density: it sums to one and draws what it says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortized.posteriors import flows

SMALL = {"num_layers": 2, "width": 8, "depth": 1}
FAMILIES = {
    "gaussian": flows.gaussian(),
    "mixture": flows.mixture(num_components=3, width=8, depth=1),
    "coupling": flows.spline_coupling(**SMALL, knots=5),
    "autoregressive": flows.spline_autoregressive(**SMALL, knots=5),
    "affine": flows.affine_autoregressive(**SMALL),
}
CONTEXT = jnp.array([0.7, -1.2])


def disturbed(family, dim):
    """A density away from its start, which for some is a plain normal."""
    density = family(jax.random.key(0), dim, 2)
    leaves, structure = jax.tree.flatten(density)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            x + 0.3 * jax.random.normal(key, x.shape)
            if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact) and x.size
            else x
            for key, x in zip(keys, leaves, strict=True)
        ],
    )


@pytest.mark.parametrize(
    "name",
    [
        "gaussian",
        "mixture",
        "coupling",
        pytest.param("autoregressive", marks=pytest.mark.slow),
        pytest.param("affine", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dim", [1, 2])
def test_a_family_is_a_density(name, dim):
    density = disturbed(FAMILIES[name], dim)
    line = jnp.linspace(-15, 15, {1: 6001, 2: 801}[dim])
    grid = jnp.stack(jnp.meshgrid(*[line] * dim, indexing="ij"), -1).reshape(-1, dim)
    mass = jnp.exp(density.log_prob(grid, CONTEXT)) * (line[1] - line[0]) ** dim
    np.testing.assert_allclose(mass.sum(), 1, atol=0.01)
    draws = density.sample(jax.random.key(2), (4000,), CONTEXT)
    mean = (mass[:, None] * grid).sum(0)
    spread = jnp.sqrt((mass[:, None] * (grid - mean) ** 2).sum(0))
    assert (abs(draws.mean(0) - mean) < 5 * spread / 4000**0.5 + 0.01 * spread).all()
    below = (mass[:, None] * (grid < mean)).sum(0)
    error = jnp.sqrt(below * (1 - below) / 4000)
    assert (abs((draws < mean).mean(0) - below) < 5 * error + 0.02).all()


def test_a_gaussian_is_fitted_in_closed_form():
    key, noise = jax.random.split(jax.random.key(5))
    context = jax.random.normal(key, (500, 2))
    theta = context @ jnp.array([[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]]) + 1
    theta = theta + jax.random.normal(noise, theta.shape) @ jnp.array(
        [[1.0, 0.5, 0.0], [0.0, 0.3, 0.2], [0.0, 0.0, 2.0]]
    )
    density = flows.gaussian()(key, 3, 2).fitted(theta, context)

    def loss(parts):
        return -flows.Gaussian((3,), (2,), *parts).log_prob(theta, context).mean()

    grads = jax.grad(loss)((density.weight, density.bias, density.log_scale, density.below))
    assert all(abs(g).max() < 2e-3 for g in jax.tree.leaves(grads))


@pytest.mark.bad_input
def test_counts_are_checked():
    with pytest.raises(ValueError, match="num_layers"):
        flows.spline_coupling(num_layers=0)
