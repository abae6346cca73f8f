"""Guides against quadrature and closed forms: densities, what they learn, and their plates."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoDiagonalNormal
from numpyro.infer.util import transform_fn
from scipy import special

from amortized import fit
from amortized.posteriors import flows, summaries
from amortized.variational import densities, guides, svi
from amortized.variational.losses import ReweightedWakeSleep, StickingTheLanding

from . import problems

KEY = jax.random.key(11)
X = problems.pca_data()
COUNTS = jnp.array([3.0, 0.0, 5.0, 2.0])
SMALL = flows.spline_coupling(num_layers=1, width=8, depth=1, knots=4)


def rates(x: Any) -> None:
    """A rate for each datum, which is positive, x ~ Poisson(r)."""
    with numpyro.plate("data", 8, subsample_size=len(x)):
        r = numpyro.sample("r", dist.LogNormal(0.5, 0.7))
        numpyro.sample("x", dist.Poisson(r), obs=x)


def one_rate(x: Any) -> None:
    """One rate for all data."""
    r = numpyro.sample("r", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", 4, subsample_size=len(x)):
        numpyro.sample("x", dist.Poisson(r), obs=x)


def traced(guide: Any, values: Any = None, x: Any = COUNTS) -> Any:
    values = values or {}
    return handlers.trace(handlers.seed(handlers.substitute(guide, values), KEY)).get_trace(x=x)


def rough(network: Any) -> Any:
    """Another start, far from the identity."""
    params, rest = eqx.partition(network, eqx.is_inexact_array)
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), params)
    return eqx.combine(moved, rest)


@pytest.mark.parametrize("flow", [None, SMALL, flows.mixture(num_components=2, width=8, depth=1)])
def test_a_local_density_integrates_to_one_for_every_datum(flow: Any):
    guide = guides.encoded(KEY, rates, {"x": COUNTS}, site="r", flow=flow)
    start = traced(guide)["r_encoder$params"]["value"]
    fn = traced(guide, {"r_encoder$params": rough(start)})["r"]["fn"]
    u = jnp.linspace(-16, 16, 8001)
    law = np.asarray(jax.jit(lambda: jnp.exp(fn.log_prob(jnp.exp(u)[:, None]) + u[:, None]))())
    np.testing.assert_allclose(np.trapezoid(law, u, axis=0), 1, atol=2e-3)
    assert np.std(law, axis=1).max() > 1e-3


def test_the_density_of_a_flow_over_all_latents_integrates_to_one():
    guide = guides.AutoFlow(one_rate, KEY, flow=SMALL)
    start = traced(guide)
    values = {"auto_flow$params": rough(start["auto_flow$params"]["value"])}

    @jax.jit
    @jax.vmap
    def density(u: Any) -> Any:
        trace = traced(guide, values | {"_auto_latent": u[None]})
        return trace["r"]["value"], densities.total(trace)

    z, log_q = map(np.asarray, density(jnp.linspace(-8, 8, 4001)))
    assert np.trapezoid(np.exp(log_q), z) == pytest.approx(1, abs=2e-3)


def trained(model: Any, guide: Any, data: Any, num: int = 600, rate: float = 0.03) -> Any:
    training = svi.training(KEY, model, guide, StickingTheLanding(4), data=data)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num))
    return svi.values(
        training, fit.run(KEY, training, optimizer=optimizer, num_steps=num, progress=False)
    )


def test_a_flow_learns_a_posterior_that_is_no_gaussian():
    """Gamma(2 + sum x, 1 + n): weights tell the evidence, and hardly vary."""
    guide = guides.AutoFlow(one_rate, KEY, flow=SMALL)
    values = trained(one_rate, guide, {"x": COUNTS})
    found = np.asarray(svi.log_weights(KEY, one_rate, guide, values, {"x": COUNTS}, 500))
    shape = 2 + float(COUNTS.sum())
    evidence = special.gammaln(shape) - shape * np.log(5.0) - special.gammaln(COUNTS + 1).sum()
    assert found.mean() == pytest.approx(evidence, abs=0.01) and found.std() < 0.1
    draws = guide.sample_posterior(KEY, values, sample_shape=(2000,))["r"]
    assert float(draws.mean()) == pytest.approx(shape / 5, rel=0.03)


def test_encoders_learn_the_best_gaussians_of_every_datum():
    """Diagonal ones have a gap of (sum log L_ii - log det L) / 2, L the posterior's precision; full
    ones none.  The contexts have gradients: this is what flowjax's own wrapper stops.
    """
    precision = np.linalg.inv(problems.COVARIANCE)
    gap = (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1]) / 2
    truth = problems.pca_log_likelihood(X)
    model = handlers.block(problems.pca, hide=["weight"])
    for flow, lost in ((None, gap), (flows.gaussian(), 0.0)):
        guide = guides.encoded(
            KEY, model, {"x": X}, site="z", flow=flow, summary=summaries.identity()
        )
        values = trained(model, guide, {"x": X}, 400, 0.05)
        found = np.asarray(svi.log_weights(KEY, model, guide, values, {"x": X}, 2000))
        np.testing.assert_allclose(found.mean(0), truth - lost, atol=0.05)
    assert gap > 0.1


def test_contexts_have_gradients():
    """Which flowjax's own wrapper for NumPyro stops: an encoder would not learn."""
    density = rough(SMALL(KEY, 1, 2))
    noise = jnp.array([0.3])

    def both(context: Any) -> Any:
        law = guides.Conditional(density, context)
        return jnp.stack([law.log_prob(noise), law.sample(KEY)[0]])

    assert np.abs(jax.jit(jax.jacobian(both))(jnp.array([0.5, -1.0]))).min() > 1e-3


def both(x: Any) -> None:
    """A global scale and a rate for each datum."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("data", 8, subsample_size=len(x)):
        r = numpyro.sample("r", dist.LogNormal(0.5, 0.7))
        numpyro.sample("x", dist.Poisson(r * scale), obs=x)


def test_global_and_local_latents_go_together_in_minibatches():
    local = guides.encoded(KEY, both, {"x": COUNTS}, site="r", summary=summaries.identity())
    whole = AutoDiagonalNormal(handlers.block(both, hide=["r"]))

    def guide(x: Any) -> None:
        whole(x=x)
        local(x=x)

    for rows in (8, 4, 2):
        trace = traced(local, x=jnp.ones(rows))
        assert (trace["r"]["scale"] or 1) == 8 / rows and trace["r"]["value"].shape == (rows,)
    data = {"x": jnp.tile(COUNTS, 2)}
    training = svi.training(KEY, both, guide, Trace_ELBO(), data=data, batch_size=4)
    out = fit.run(KEY, training, optimizer=optax.adam(0.03), num_steps=30, progress=False)
    assert out.skipped == 0 and out.history["loss"][-10:].mean() < out.history["loss"][:3].mean()


@pytest.mark.parametrize(
    "automatic", [AutoDiagonalNormal, functools.partial(guides.AutoFlow, key=KEY, flow=SMALL)]
)
def test_automatic_guides_are_scored_as_numpyro_scores_them(automatic: Any):
    """Their sites are functions of one draw: a second run makes them again."""
    guide, data = automatic(one_rate), {"x": COUNTS}
    training = svi.training(KEY, one_rate, guide, Trace_ELBO(3), data=data)
    values = training.loss.transforms, training.params

    @jax.jit
    def losses() -> Any:
        objectives = Trace_ELBO(3), StickingTheLanding(3), ReweightedWakeSleep(3)
        found = [svi.Loss(one_rate, guide, o, values[0])(values[1], KEY, data) for o in objectives]
        return found[0][0], found[1][0], found[2][1]["bound"]

    elbo, path, bound = losses()
    assert float(path) == pytest.approx(float(elbo), rel=1e-5)
    wake_key, _ = jax.random.split(KEY)
    each = svi.log_weights(wake_key, one_rate, guide, transform_fn(*values), data, 3)
    assert float(bound) == pytest.approx(float(jax.nn.logsumexp(each) - np.log(3)), rel=1e-5)
    # Whatever bits the first run had.
    call = densities.Call(one_rate, guide, transform_fn(*values), (), data)
    _, again = densities.drawn(KEY, call, draws=lambda value: value * (1 + 1e-6))
    assert np.isfinite(densities.total(again))


@pytest.mark.bad_input
def test_what_has_no_such_guide_is_refused():
    with pytest.raises(ValueError, match="a latent 's' in one plate.*latents \\['r'\\]"):
        guides.encoded(KEY, rates, {"x": COUNTS}, site="s")
    with pytest.raises(ValueError, match="the plates \\[\\] of it"):
        guides.encoded(KEY, one_rate, {"x": COUNTS}, site="r")
    with pytest.raises(ValueError, match="expected z continuous"):
        guides.encoded(KEY, problems.symbols, {"x": jnp.array([0, 1])}, site="z")
    flow = flows.mixture(num_components=2)
    guide = guides.encoded(KEY, rates, {"x": COUNTS}, site="r", flow=flow)
    with pytest.raises(ValueError, match="\\['r'\\] without"):
        svi.training(KEY, rates, guide, Trace_ELBO(), data={"x": COUNTS})
