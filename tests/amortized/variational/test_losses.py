"""Losses against closed forms and enumeration, and the faults that these see."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO

from amortized.variational import densities, losses, svi
from amortized.variational.losses import InfoVAE, ReweightedWakeSleep, StickingTheLanding

from . import problems
from .problems import NUM, SYMBOLS, pca, pca_guide

KEY = jax.random.key(7)
X = problems.pca_data()
EXACT = {
    "weight": jnp.asarray(problems.WEIGHT),
    "gain": jnp.asarray(problems.GAIN, jnp.float32),
    "factor": jnp.asarray(np.linalg.cholesky(problems.COVARIANCE), jnp.float32),
}
ROUGH = EXACT | {"gain": 0.7 * EXACT["gain"], "factor": 1.4 * EXACT["factor"]}


KEYS = jax.random.split(KEY, 2000)
ELBO, PATH, WAKE = Trace_ELBO(2), StickingTheLanding(2), ReweightedWakeSleep(2)


@functools.partial(jax.jit, static_argnums=0)
def gradients(objective: Any, values: Any, keys: Any) -> Any:
    """Losses and gradients of all data, for every key."""

    def loss(values: Any, key: Any) -> Any:
        return objective.loss(key, values, pca, pca_guide, x=X)

    return jax.vmap(jax.value_and_grad(loss), (None, 0))(values, keys)


def test_the_elbo_of_the_exact_posterior_is_the_log_likelihood_for_every_draw():
    truth = problems.pca_log_likelihood(X)
    found = svi.log_weights(KEY, pca, pca_guide, EXACT, {"x": X}, 5)
    np.testing.assert_allclose(found, np.broadcast_to(truth, (5, NUM)), atol=2e-5)
    rough = svi.log_weights(KEY, pca, pca_guide, ROUGH, {"x": X}, 5)
    assert np.std(np.asarray(rough), axis=0).min() > 0.05


def test_losses_of_minibatches_are_unbiased():
    """At the exact posterior nothing is left to chance: batches and their scales make the whole."""
    iwae = RenyiELBO(num_particles=2)

    def losses(x: Any) -> Any:
        call = densities.Call(pca, pca_guide, EXACT, (), {"x": x})
        bound = WAKE.measured(KEY, call)[1]["bound"]
        each = [f.loss(KEY, EXACT, pca, pca_guide, x=x) for f in (ELBO, PATH, iwae)]
        return jnp.stack([*each, -bound])

    whole, parts = jax.jit(lambda: (losses(X), jax.vmap(losses)(X.reshape(4, 3, 3))))()
    truth = -problems.pca_log_likelihood(X).sum()
    np.testing.assert_allclose(whole, truth, atol=2e-4)
    np.testing.assert_allclose(parts.mean(0), truth, atol=2e-4)
    assert np.std(np.asarray(parts), axis=0).min() > 0.5


def test_bounds_grow_with_the_number_of_samples_to_the_log_likelihood():
    """For every K the same draws in groups of K."""
    draws = np.asarray(svi.log_weights(KEY, pca, pca_guide, ROUGH, {"x": X}, 2**15), np.float64)
    bounds = []
    for k in (1, 4, 16, 64, 2**15):
        groups = draws.reshape(-1, k, NUM)
        bounds.append((np.logaddexp.reduce(groups, 1) - np.log(k)).mean(0).sum())
    truth = problems.pca_log_likelihood(X).sum()
    assert np.all(np.diff(bounds) > 0) and bounds[0] < truth - 1
    assert bounds[-1] == pytest.approx(truth, abs=0.02 * NUM)
    # NumPyro's is the same bound, data by data.
    found, _ = gradients(RenyiELBO(num_particles=4), ROUGH, KEYS)
    assert abs(-found.mean() - bounds[1]) < 5 * found.std() / np.sqrt(len(KEYS))


def test_sticking_the_landing_has_no_variance_at_the_exact_posterior():
    values, path = gradients(PATH, EXACT, KEYS)
    np.testing.assert_allclose(values, -problems.pca_log_likelihood(X).sum(), atol=2e-4)
    assert np.abs(path["gain"]).max() < 1e-2 and np.abs(path["factor"]).max() < 1e-2
    # The planted fault: the score of the guide left in.
    _, full = gradients(ELBO, EXACT, KEYS)
    assert np.std(np.asarray(full["gain"]), axis=0).max() > 1
    # The model's own gradient is not touched, and elsewhere both are gradients of the same.
    np.testing.assert_allclose(path["weight"], full["weight"], atol=1e-2)
    (_, path), (_, full) = gradients(PATH, ROUGH, KEYS), gradients(ELBO, ROUGH, KEYS)
    for name in ("gain", "factor"):
        difference = np.asarray(path[name] - full[name])
        error = difference.std(0) / np.sqrt(len(KEYS))
        assert np.all(np.abs(difference.mean(0)) < 5 * error + 1e-6)


def test_infovae_without_change_is_the_elbo():
    firsts = jax.vmap(lambda key: jax.random.split(key, 3)[0])(KEYS)
    found, gradient = gradients(InfoVAE(0.0, 1.0, site="z", num_particles=2), ROUGH, KEYS)
    value, plain = gradients(ELBO, ROUGH, firsts)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), gradient, plain
    )


NUM_SYMBOLS = len(SYMBOLS)


def infovae_identity(alpha: float, lam: float) -> tuple[float, float]:
    """The loss of all data of the discrete model in expectation, and what it should be."""
    q = np.asarray(jax.nn.sigmoid(problems.START), np.float64)[SYMBOLS]
    guide = np.stack([1 - q, q], 1)  # [N, Z]
    marginal = guide.mean(0)
    apart = float((marginal * np.log(marginal / problems.PRIOR)).sum())
    objective = InfoVAE(alpha, lam, site="z", divergence=lambda left, right: jnp.float32(apart))
    values = {"likelihood": jnp.log(problems.LIKELIHOOD), "logit": jnp.asarray(problems.START)}
    x = jnp.asarray(SYMBOLS)

    def loss(fixed: Any) -> Any:
        return objective.loss(KEY, values, problems.symbols, fixed, x=x)

    found = jax.jit(lambda: problems.enumerated(loss, x, values["logit"]))()
    law = np.zeros((2, 3))  # q(z, x)
    np.add.at(law.T, SYMBOLS, guide / NUM_SYMBOLS)
    data = law.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = (law * np.log(law / (marginal[:, None] * data))).sum()
        given = (law * np.log(law / marginal[:, None] / problems.LIKELIHOOD)).sum()
    truth = lam * apart + given - alpha * information - (data * np.log(data)).sum()
    return float(found), NUM_SYMBOLS * float(truth)


@pytest.mark.parametrize("alpha, lam", [(0.0, 1.0), (0.4, 2.5), (-1.0, 3.0)])
def test_infovae_is_what_its_identity_says(alpha: float, lam: float):
    found, truth = infovae_identity(alpha, lam)
    assert found == pytest.approx(truth, abs=2e-5)


def test_mmd_is_the_distance_of_two_laws():
    """Without bias: zero on average for the same law, and the kernel's own for two points."""
    keys = jax.random.split(KEY, 500)

    def one(key: Any) -> Any:
        left, right = jax.random.normal(key, (2, 20, 2))
        return losses.mmd(left, right), losses.mmd(left + jnp.array([1.0, 0.0]), right)

    same, apart = map(np.asarray, jax.jit(jax.vmap(one))(keys))
    assert abs(same.mean()) < 5 * same.std() / np.sqrt(500) and same.min() < 0
    assert apart.mean() > 20 * abs(same.mean())
    points = losses.mmd(jnp.zeros((3, 1)), jnp.array([[-1.0], [0.0], [1.0]]))
    # unit 2 var = 2: k(0, 1) at scales 1/4, 1, 4 of 1/2.
    one, two = (np.mean([1 / (1 + r**2 / 2 / s) for s in (0.25, 1, 4)]) for r in (1, 2))
    within = (4 * one + 2 * two) / 6
    assert float(points) == pytest.approx(1 - 2 * (1 + 2 * one) / 3 + within, abs=1e-6)


def discrete(objective: Any, logit: Any, key: Any) -> Any:
    values = {"likelihood": jnp.log(problems.LIKELIHOOD)}

    def loss(logit: Any) -> Any:
        call = values | {"logit": logit}
        return objective.loss(key, call, problems.symbols, problems.symbols_guide, x=SYMBOLS)

    return jax.grad(loss)(logit)


@pytest.mark.parametrize("sleep", [0.0, 1.0, 0.5])
def test_wake_and_sleep_rest_at_the_enumerated_posterior(sleep: float):
    objective, keys = ReweightedWakeSleep(3, sleep=sleep), jax.random.split(KEY, 4000)

    @jax.jit
    def z_scores(logit: Any) -> Any:
        each = jax.vmap(lambda key: discrete(objective, logit, key))(keys)
        return each.mean(0) / (each.std(0) / jnp.sqrt(len(keys)))

    assert np.abs(z_scores(problems.exact_logit())).max() < 4
    assert np.abs(z_scores(jnp.asarray(problems.START))).min() > 20


def test_neither_draws_nor_dreams_have_a_gradient():
    """Of continuous latents, too: phi rests at the exact posterior, and theta does not dream."""
    _, wake = gradients(WAKE, EXACT, KEYS)
    _, sleep = gradients(ReweightedWakeSleep(2, sleep=1.0), EXACT, KEYS)
    for each in (wake, sleep):
        phi = np.concatenate(
            [each["gain"].reshape(-1, 6), each["factor"][:, *np.tril_indices(2)]], 1
        )
        assert np.abs(phi.mean(0) / (phi.std(0) / np.sqrt(len(KEYS)))).max() < 5
    np.testing.assert_allclose(wake["weight"], sleep["weight"], rtol=1e-4, atol=1e-3)


def test_wake_theta_is_the_gradient_of_the_log_likelihood():
    """At the exact posterior weights are equal: it is Fisher's identity."""
    logit, keys = problems.exact_logit(), jax.random.split(KEY, 2000)
    start = jnp.log(jnp.asarray(problems.LIKELIHOOD, jnp.float32))

    def loss(likelihood: Any, key: Any) -> Any:
        values = {"likelihood": likelihood, "logit": logit}
        call = densities.Call(problems.symbols, problems.symbols_guide, values, (), {"x": SYMBOLS})
        return ReweightedWakeSleep(2).measured(key, call)

    def truth(likelihood: Any) -> Any:
        joint = jnp.log(problems.PRIOR)[:, None] + jax.nn.log_softmax(likelihood, 1)
        return -jax.nn.logsumexp(joint, axis=0)[SYMBOLS].sum()

    gradient = jax.vmap(jax.grad(loss, has_aux=True), (None, 0))
    each, metrics = jax.jit(gradient)(start, keys)
    error = np.asarray(each.std(0)) / np.sqrt(len(keys))
    assert np.all(np.abs(each.mean(0) - jax.grad(truth)(start)) < 5 * error)
    np.testing.assert_allclose(metrics["bound"], -truth(start), rtol=1e-5)
    np.testing.assert_allclose(metrics["ess"], 1, rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="alpha <= 1 and alpha \\+ lam >= 1"):
        InfoVAE(0.5, 0.2, site="z")
    with pytest.raises(ValueError, match="share in \\[0, 1\\]"):
        ReweightedWakeSleep(2, sleep=2.0)
    with pytest.raises(ValueError, match="num_particles"):
        StickingTheLanding(0)
    with pytest.raises(ValueError, match="site 'w' in one plate"):
        lost = InfoVAE(0.0, 2.0, site="w")
        jax.eval_shape(lambda: lost.loss(KEY, EXACT, pca, pca_guide, x=X))
    call = densities.Call(lambda y: pca(y), lambda y: pca_guide(y), EXACT, (), {"y": X})
    with pytest.raises(ValueError, match="\\['x'\\] observed and the arguments \\['y'\\]"):
        jax.eval_shape(lambda: ReweightedWakeSleep(2, sleep=1.0).measured(KEY, call))
