"""Discrete latents beside continuous ones, against the enumerated posterior of a mixture."""

from __future__ import annotations

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers

from amortized import fit
from amortized.posteriors import (
    correction,
    discrete,
    flow_matching,
    flows,
    nle,
    npe,
    robustness,
    sequential,
)
from amortized.posteriors.simulators import simulator
from amortized.training import trained_part

from .problems import rate

KEY = jax.random.key(5)
SHARES, CENTRES = jnp.array([0.2, 0.3, 0.5]), jnp.array([-1.0, 0.5, 2.0])
WITHIN, NOISE = 0.5, 0.7
FLAGS = jnp.array([0.3, 0.8])
TOTAL = WITHIN**2 + NOISE**2


def mixture():
    """theta ~ N(c_kind, .5^2), x ~ N(theta, .7^2)."""
    kind = numpyro.sample("kind", dist.CategoricalProbs(SHARES))
    theta = numpyro.sample("theta", dist.Normal(CENTRES[kind], WITHIN))
    numpyro.sample("x", dist.Normal(theta, NOISE))


def several():
    """Sites of many kinds, in an order that is not that of their names."""
    size = numpyro.sample("size", dist.DiscreteUniform(2, 5))
    flags = numpyro.sample("flags", dist.BernoulliProbs(FLAGS).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(0.1 * size, 0.5))
    inside = numpyro.sample("inside", dist.Uniform(0, scale))
    numpyro.sample("x", dist.Normal(inside + flags @ jnp.array([1.0, 2.0]), 1.0))


def log_joint(kind, theta, x):
    return (
        jnp.log(SHARES)[kind]
        + dist.Normal(CENTRES[kind], WITHIN).log_prob(theta)
        + dist.Normal(theta, NOISE).log_prob(x)
    )


def log_evidence(x):
    each = jnp.log(SHARES) + dist.Normal(CENTRES, TOTAL**0.5).log_prob(x)
    return jax.nn.logsumexp(each)


def posterior_of(network):
    return npe.posterior(fit.Fitted(network, network, {}, None, 0, ""))


@pytest.fixture(scope="module")
def training():
    return npe.training(
        *(KEY, mixture),
        latents=["theta"],
        discrete=["kind"],
        observed=["x"],
        flow=flows.gaussian(),
        batch_size=500,
    )


@pytest.fixture(scope="module")
def exact(training):
    """The network as the exact posterior: logits and means are linear in x."""
    network = training.params
    (of_theta, scale), (of_x, x_scale) = (
        (standard.location.tree, standard.scale.tree)
        for standard in (network.standard, network.summary.standard)
    )
    slopes = CENTRES / TOTAL
    at_zero = jnp.log(SHARES) - CENTRES**2 / (2 * TOTAL)
    gain = WITHIN**2 / TOTAL
    head = jax.tree.map(
        lambda leaf: 0 * leaf if eqx.is_array(leaf) else leaf, network.density.heads[0]
    )
    # Two hidden units are x and -x where they are positive.
    weights = (
        head.layers[0].weight.at[:2, 0].set(jnp.array([1.0, -1.0])),
        head.layers[1].weight.at[[0, 1], [0, 1]].set(1.0),
        head.layers[2].weight.at[:, 0].set(slopes * x_scale).at[:, 1].set(-slopes * x_scale),
        at_zero + slopes * of_x,
    )

    def of_head(head):
        return (*(layer.weight for layer in head.layers), head.layers[2].bias)

    flow = network.density.flow
    weight = jnp.concatenate([gain * x_scale, (1 - gain) * CENTRES]) / scale[0]
    bias = (gain * of_x - of_theta[:1]) / scale[0]
    spread = (gain * NOISE**2) ** 0.5 / scale[0]
    parts = weight[None], bias, jnp.log(spread - flows.LEAST_SCALE)[None]
    flow = eqx.tree_at(lambda flow: (flow.weight, flow.bias, flow.log_scale), flow, parts)
    head = eqx.tree_at(of_head, head, weights)
    return eqx.tree_at(lambda n: (n.density.heads[0], n.density.flow), network, (head, flow))


def test_values_have_numbers_behind_the_other_coordinates():
    of = simulator(several, latents=["scale", "inside"], discrete=["size", "flags"], observed=["x"])
    assert (of.dim, of.num_values) == (5, (2, 2, 4))
    theta, _ = of.draws(KEY, 200)
    sites = jax.vmap(of.constrain)(theta)
    own = handlers.trace(handlers.seed(several, KEY)).get_trace()
    assert all(sites[name].dtype == own[name]["value"].dtype for name in sites)
    np.testing.assert_array_equal(theta[:, 2:4], sites["flags"])
    np.testing.assert_array_equal(theta[:, 4] + 2, sites["size"])
    assert set(np.unique(sites["size"])) == {2, 3, 4, 5}
    back = jax.vmap(of.unconstrain)(sites)
    np.testing.assert_allclose(back, theta, atol=1e-3, rtol=1e-3)
    # What the model's own density says, and a value that it does not have.
    row = {name: value[0] for name, value in sites.items()}
    found = of.log_prior(theta[0]) - of.log_jacobian(theta[0])
    expected = (
        jnp.log(0.25)
        + dist.Bernoulli(FLAGS).log_prob(row["flags"]).sum()
        + dist.LogNormal(0.1 * row["size"], 0.5).log_prob(row["scale"])
        - jnp.log(row["scale"])
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert of.unconstrain(row | {"size": 7})[4] == -1


def test_a_network_that_is_exact_has_the_enumerated_posterior(exact):
    posterior, theta = posterior_of(exact), jnp.linspace(-2, 3, 7)
    for x in (-1.3, 0.8):
        for kind in range(3):
            sites = {"theta": theta, "kind": jnp.full(7, kind)}
            found = posterior.log_prob(sites, jnp.float32(x))
            expected = log_joint(kind, theta, x) - log_evidence(x)
            np.testing.assert_allclose(found, expected, atol=2e-4)
        # Of the same draws: every weight is the evidence.
        out = correction.run(KEY, posterior, jnp.float32(x), num_particles=500)
        np.testing.assert_allclose(out.log_z, log_evidence(x), atol=1e-4)
        np.testing.assert_allclose(out.log_weights, 0, atol=5e-4)
        shares = jax.nn.softmax(jnp.log(SHARES) + dist.Normal(CENTRES, TOTAL**0.5).log_prob(x))
        counts = np.bincount(out.samples["kind"], minlength=3) / 500
        np.testing.assert_allclose(counts, shares, atol=5 * 0.5 / 500**0.5)
    nowhere = posterior.log_prob({"theta": theta, "kind": jnp.full(7, 3)}, jnp.float32(0))
    assert (nowhere == -jnp.inf).all()


def test_the_loss_is_least_at_the_exact_network(training, exact):
    wide = npe.training(
        *(KEY, mixture),
        latents=["theta"],
        discrete=["kind"],
        observed=["x"],
        flow=flows.gaussian(),
        batch_size=40_000,
    )
    batch, _ = wide.draw(KEY, exact, None)
    trained, fixed = trained_part(exact)

    def loss(trained):
        return training.loss(eqx.combine(trained, fixed), KEY, batch)[0]

    value, slopes = jax.jit(jax.value_and_grad(loss))(trained)
    steepest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    assert steepest < 5 * 2 / 40_000**0.5
    # E -log p(kind, theta | x) = E log p(x) - E log p(kind, theta, x).
    kind, theta = batch.rows.theta[:, 1].astype(jnp.int32), batch.rows.theta[:, 0]
    x = batch.rows.x["x"]
    entropy = (jax.vmap(log_evidence)(x) - log_joint(kind, theta, x)).mean()
    np.testing.assert_allclose(value, entropy, rtol=1e-4)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, trained)
    assert loss(moved) > value + 0.01


def test_training_comes_close_to_the_enumerated_posterior(training):
    rates = optax.adam(optax.cosine_decay_schedule(0.02, 300))
    out = fit.run(KEY, training, optimizer=rates, num_steps=300, progress=False)
    posterior = npe.posterior(out)
    theta, x = posterior.simulator.draws(jax.random.key(1), 2000)
    kind = theta[:, 1].astype(jnp.int32)
    exact = log_joint(kind, theta[:, 0], x["x"]) - jax.vmap(log_evidence)(x["x"])
    kl = exact - posterior.network.log_prob(theta, x)
    assert abs(kl.mean()) < 0.02 and kl.std() < 0.3


def test_law_1_of_both_kinds_of_latents(training):
    poor = posterior_of(training.params)
    x = jnp.float32(0.8)
    run = jax.jit(jax.vmap(lambda key: correction.run(key, poor, x, num_particles=50)))
    out = run(jax.random.split(KEY, 2000))
    weights = np.exp(np.asarray(out.log_weights + out.log_z[:, None], np.float64))
    evidence = np.exp(log_evidence(x))
    at = jnp.log(SHARES) + dist.Normal(CENTRES, TOTAL**0.5).log_prob(x)
    mean = CENTRES + WITHIN**2 / TOTAL * (x - CENTRES)
    for k in range(3):
        inside = np.asarray(out.samples["kind"]) == k
        for values, truth in ((1.0, 1.0), (np.asarray(out.samples["theta"]), float(mean[k]))):
            each = (weights * inside * values).mean(1)
            error = each.std() / 2000**0.5
            expected = np.exp(at[k]) * truth
            assert abs(each.mean() - expected) < 5 * error and error < 0.03 * evidence


def test_flow_matching_learns_the_head_beside_its_field():
    training = flow_matching.training(
        *(KEY, mixture),
        latents=["theta"],
        discrete=["kind"],
        observed=["x"],
        flow=flow_matching.family(width=8, depth=1),
        batch_size=300,
    )
    network = training.params
    batch, _ = training.draw(KEY, network, None)
    value, _ = training.loss(network, KEY, batch)
    codes, context = batch.rows.theta[:, 1].astype(jnp.int32), batch.rows.x
    logits = jax.vmap(lambda x: network.density.heads[0](network.summary(x)))(context)
    head = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[:, None], 1).mean()
    silent = eqx.tree_at(
        lambda n: n.density.heads[0].layers[-1],
        network,
        jax.tree.map(jnp.zeros_like, network.density.heads[0].layers[-1]),
    )
    other, _ = training.loss(silent, KEY, batch)
    np.testing.assert_allclose(value + head, other - jnp.log(3), atol=1e-4)


def test_discrete_latents_alone():
    training = npe.training(
        *(KEY, mixture), latents=[], discrete=["kind"], observed=["x"], batch_size=500
    )
    assert training.params.density.flow is None
    rates = optax.adam(optax.cosine_decay_schedule(0.02, 200))
    out = fit.run(KEY, training, optimizer=rates, num_steps=200, progress=False)
    posterior = npe.posterior(out)
    at = jnp.log(SHARES) + dist.Normal(CENTRES, TOTAL**0.5).log_prob(0.8)
    found = posterior.log_prob({"kind": jnp.arange(3)}, jnp.float32(0.8))
    np.testing.assert_allclose(jnp.exp(found), jax.nn.softmax(at), atol=0.05)


@pytest.mark.slow
def test_rounds_take_them_too():
    out = sequential.run(
        *(KEY, mixture, jnp.float32(0.8)),
        latents=["theta"],
        discrete=["kind"],
        observed=["x"],
        flow=flows.gaussian(),
        optimizer=optax.adam(1e-2),
        num_rounds=2,
        num_simulations=200,
        num_steps=10,
        batch_size=50,
        progress=False,
    )
    assert out.posterior.sample(KEY, jnp.float32(0.8), 9)["kind"].shape == (9,)


def endless():
    count = numpyro.sample("count", dist.Poisson(3.0))
    numpyro.sample("x", dist.Normal(count, 1.0))


def unknown():
    theta = numpyro.sample("theta", dist.Poisson(3.0))
    count = numpyro.sample("count", dist.Binomial(theta, 0.5))
    numpyro.sample("x", dist.Normal(count, 1.0))


@pytest.mark.parametrize(
    ("model", "latents", "chosen", "message"),
    [
        (mixture, ["theta", "kind"], [], r"npe\.training\(\.\.\., discrete=\['kind'\]\)"),
        (mixture, ["theta"], ["theta"], r"named once, got \['theta'\]"),
        (mixture, [], [], "expected latents as names"),
        (mixture, ["theta"], ["sort"], r"expected discrete among .*\['sort'\]"),
        (rate, [], ["rate"], r"finitely many values.*\['rate'\]"),
        (endless, [], ["count"], r"finitely many values.*\['count'\]"),
        (unknown, [], ["count"], r"known before the model runs.*\['count'\]"),
    ],
)
@pytest.mark.bad_input
def test_what_is_refused(model, latents, chosen, message):
    with pytest.raises(ValueError, match=message):
        npe.training(KEY, model, latents=latents, discrete=chosen, observed=["x"])


@pytest.mark.bad_input
def test_plain_flows_refuse_them(training):
    with pytest.raises(ValueError, match=r"discrete=\['kind'\]"):
        nle.training(KEY, mixture, latents=["kind"], observed=["x"])
    with pytest.raises(ValueError, match=r"got discrete \['kind'\]"):
        robustness.regularised(training, beta=0.1)


def test_draws_are_of_the_law_that_scores_them():
    """Two discrete coordinates that depend on each other, and a Gaussian far apart for each pair:
    frequencies against the density, and each Gaussian where its values put it.
    """
    density = discrete.beside(flows.gaussian(), [2, 3])(KEY, 3, 1)
    told = jnp.array([0.0, 0.0, 10.0, 0.0, 30.0, 60.0])  # the context, and both one-hot codes
    head = density.heads[1]
    weight = head.layers[0].weight.at[:, 1:].multiply(20.0)
    density = eqx.tree_at(
        lambda d: (d.flow.weight, d.heads[1].layers[0].weight), density, (told[None], weight)
    )
    context, num = jnp.array([0.3]), 20_000
    draws = density.sample(jax.random.key(3), (num,), context)
    total, laws = 0.0, []
    for i, j in itertools.product(range(2), range(3)):
        mean = 10.0 * i + 30.0 * j
        at = jnp.array([mean, i, j])
        # The density at a Gaussian's middle, over that of a standard normal there.
        share = float(jnp.exp(density.log_prob(at, context)) * (2 * jnp.pi) ** 0.5)
        share *= float(density.flow.factor[0, 0])
        here = draws[(draws[:, 1] == i) & (draws[:, 2] == j), 0]
        error = max((share * (1 - share) / num) ** 0.5, 1e-4)
        assert abs(len(here) / num - share) < 5 * error
        assert len(here) == 0 or abs(here.mean() - mean) < 5 / len(here) ** 0.5
        laws.append(share)
        total += share
    np.testing.assert_allclose(total, 1, atol=1e-4)
    table = np.array(laws).reshape(2, 3)
    table /= table.sum(1, keepdims=True)
    assert abs(table[0] - table[1]).max() > 0.05  # the second does depend on the first
