"""Every form of the ratio's loss is least at the ratio."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

from amortized import fit
from amortized.posteriors import nre
from samplers.latent import posterior

from .problems import linear, linear_evidence, linear_posterior, rate

KEY, X = jax.random.key(8), jnp.array([1.5, -2.0])
FORMS = {
    "A": nre.Binary(),
    "B": nre.Contrastive(4),
    "C": nre.Bounded(4, 0.5),
    "balanced": nre.Balanced(1.0),
}


def log_ratio(theta, x):
    """log p(x | theta) / p(x) of the linear model, in closed form."""
    mean = jnp.stack([theta[0] + theta[1], theta[1]])
    own = dist.Normal(mean, jnp.array([0.5, 1.0])).log_prob(x).sum()
    return own - linear_evidence(x)


def shifted(epsilon, rows, num):
    """The table of the exact ratio plus epsilon times a bounded function of theta and x."""
    others = (jnp.arange(len(rows.theta))[:, None] + jnp.arange(num)) % len(rows.theta)

    def one(theta, x):
        return log_ratio(theta, x) + epsilon * (1 + jnp.tanh(theta[0] - 0.5 * x[0] + theta[1]))

    return jax.vmap(jax.vmap(one, (0, None)))(rows.theta[others], rows.x["x"])


def slopes(form, num=40_000):
    """d loss / d epsilon of every row at the exact ratio, in blocks whose rows are independent."""
    of = nre.simulator(linear, latents=["theta"], observed=["x"])
    rows = of.draws(KEY, num)
    loss = jax.jit(jax.jacfwd(lambda epsilon: form(shifted(epsilon, rows, form.columns))))
    return np.asarray(loss(jnp.float32(0)), np.float64).reshape(-1, 40).mean(1)


@pytest.mark.parametrize("name", FORMS)
def test_the_ratio_is_a_stationary_point(name):
    found = slopes(FORMS[name])
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean()) < 5 * error < 0.03


class Careless(nre.Bounded):
    """C where "none of K" is asked of the latents among which is the own."""

    def __call__(self, table):
        return super().__call__(jnp.concatenate([table[:, :-1], table[:, :1]], 1))


def test_a_fault_is_seen():
    found = slopes(Careless(4, 0.5))
    assert abs(found.mean()) > 10 * found.std() / len(found) ** 0.5


def test_the_loss_is_above_the_optimum_elsewhere():
    of = nre.simulator(linear, latents=["theta"], observed=["x"])
    rows = of.draws(KEY, 4000)
    for form in FORMS.values():
        tables = [shifted(jnp.float32(e), rows, form.columns) for e in (-0.7, 0.0, 0.7)]
        below, least, above = (form(table).mean() for table in tables)
        assert least < min(below, above)


@pytest.mark.slow
@pytest.mark.optimised
def test_the_model_that_it_makes_has_the_posterior():
    training = nre.training(
        KEY, linear, latents=["theta"], observed=["x"], loss=nre.Contrastive(10), batch_size=200
    )
    schedule = optax.cosine_decay_schedule(2e-3, 4000)
    out = fit.run(KEY, training, optimizer=optax.adam(schedule), num_steps=4000, progress=False)
    of = posterior.density(nre.model(out, X))
    mean, covariance = linear_posterior(X)
    # Of a grid around the posterior, its mean and covariance under the learned density.
    root = jnp.linalg.cholesky(covariance)
    line = jnp.linspace(-4, 4, 81)
    grid = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2) @ root.T + mean
    log_density = jax.vmap(of.at(jnp.float32(1)))(grid)
    weights = jax.nn.softmax(log_density)
    found = weights @ grid
    scale = jnp.sqrt(jnp.diag(covariance))
    assert (abs(found - mean) < 0.15 * scale).all()
    spread = jnp.sqrt(weights @ (grid - found) ** 2)
    np.testing.assert_allclose(spread, scale, rtol=0.15)


def test_what_is_discrete_can_be_observed():
    training = nre.training(KEY, rate, latents=["rate"], observed=["x"], batch_size=20)
    batch, _ = training.draw(KEY, training.params, None)
    value, metrics = training.loss(training.params, KEY, batch)
    np.testing.assert_allclose(value, np.log(10), atol=0.3)  # nothing is learned yet
    assert set(metrics) == {"invalid"}


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="batch_size above the 10 latents"):
        nre.training(KEY, linear, latents=["theta"], observed=["x"], batch_size=10)
    with pytest.raises(ValueError, match="held out in a step"):
        nre.training(
            KEY, linear, latents=["theta"], observed=["x"], batch_size=20, num_simulations=1000
        )
