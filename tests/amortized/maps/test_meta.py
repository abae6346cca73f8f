"""Meta-learning where all is Gaussian, y_i ~ N(phi_i, s2), phi_i ~ N(th, t2): the posterior of a
task, the marginal likelihood and the best theta are known; then over adapters of a decoder.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

from amortized import fit
from amortized.maps import meta
from amortized.training import trained_part
from models import config, lora, tabular, transformer
from samplers.draws import ancestral

KEY = jax.random.key(6)
Y = jnp.array([0.8, -0.3, 1.9, 1.1], jnp.float32)
S2, T2, TH = 0.5, 0.36, 0.4


def log_likelihood(weights, y):
    return dist.Normal(weights["phi"], S2**0.5).log_prob(y)


def setting(beta, th=TH):
    """Enough steps that the posterior of a task is reached."""
    start = {"phi": jnp.float32(th)}
    inner = optax.adam(optax.exponential_decay(0.1, 30, 0.7), eps_root=1e-12)
    options = {"beta": beta, "inner": inner, "num_steps": 200, "spread": T2**0.5, "batch_size": 4}
    return meta.training(KEY, log_likelihood, start, Y, **options)


def local(beta, th=TH):
    """Mean and variance of q_i, as a formula."""
    precision = 1 / S2 + beta / T2
    return (Y / S2 + beta * th / T2) / precision, beta / precision


@pytest.fixture
def exact(monkeypatch):
    """Draws at plus and minus one standard deviation: exact for what is quadratic."""
    monkeypatch.setattr(meta, "_noise", lambda key, like: jax.tree.map(jnp.ones_like, like))


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.1])
def test_a_task_has_the_posterior_of_the_formula(exact, beta):
    training = setting(beta)
    adapt = jax.jit(jax.vmap(lambda y: training.loss.adapted(training.params, KEY, y)))
    found, (mean, variance) = adapt(Y), local(beta)
    np.testing.assert_allclose(jax.vmap(lambda q: q.mean["phi"])(found), mean, atol=2e-3)
    np.testing.assert_allclose(
        jax.vmap(lambda q: q.scale["phi"])(found), np.full(4, variance**0.5), rtol=0.01
    )


def test_at_beta_one_the_loss_is_the_marginal_likelihood_and_theta_the_mean_of_means(exact):
    prior = dist.Normal(0, 1)

    @jax.jit
    def at(th):
        training = setting(1.0, th)
        trained, fixed = trained_part(training.params)

        def loss(trained):
            return training.loss(eqx.combine(trained, fixed), KEY, Y)[0]

        value, slope = jax.value_and_grad(loss)(trained)
        return value, slope.means[0].left

    marginal = dist.Normal(TH, (S2 + T2) ** 0.5).log_prob(Y).mean()
    theta = prior.log_prob(TH) + prior.log_prob(0.0)
    np.testing.assert_allclose(at(jnp.float32(TH))[0], -marginal - theta / 4, atol=1e-3)
    best = (Y.sum() / (S2 + T2)) / (4 / (S2 + T2) + 1)
    np.testing.assert_allclose(at(best)[1], 0, atol=2e-3)
    assert abs(at(best + 0.1)[1]) > 0.05


def test_kl_and_draws():
    q, p = (meta.Normal(KEY, jnp.zeros((5, 4), jnp.float32), 2, s) for s in (0.5, 0.8))
    key, other = jax.random.split(KEY)
    q = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape, x.dtype), q)
    p = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(other, x.shape, x.dtype), p)
    laws = [dist.Normal(normal.mean, normal.scale) for normal in (q, p)]
    truth = dist.kl_divergence(*laws).sum()
    np.testing.assert_allclose(meta.kl(q, p), truth, rtol=1e-5)
    assert np.linalg.matrix_rank(np.asarray(q.mean - q.start.tree)) == 2
    draws = jax.vmap(q.sample)(jax.random.split(KEY, 4000))
    z = (draws.mean(0) - q.mean) / q.scale * 4000**0.5
    assert np.abs(z).max() < 5
    np.testing.assert_allclose(draws.std(0), q.scale, rtol=5 / 8000**0.5)
    # A prior in half precision is compared in single.
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
    assert meta.kl(half, p).dtype == jnp.float32


V, T, EOS = 5, 4, 1


def language():
    """Tasks, each of strings that rarely end and favour a token of their own, and a decoder that
    knows nothing of it.
    """
    laws = np.full((7, V), 0.1)
    laws[:, EOS] = 0.02
    laws[np.arange(7), [0, 2, 3, 4, 0, 2, 3]] = 0.68
    chains = [tabular.markov(np.broadcast_to(law / law.sum(), (V, V)), eos=EOS) for law in laws]
    draw = jax.jit(
        lambda lm: ancestral.run(KEY, lm.given([0], max_tokens=T), num_samples=24).sequences
    )
    strings = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(draw, chains))
    sizes = config.small(V, hidden_size=16, num_layers=1, num_heads=2, context=8)
    base = transformer.random(KEY, sizes, EOS)
    # Its laws can be far from uniform.
    params = base.params | {"head": 20 * base.params["head"]}
    return strings, dataclasses.replace(base, params=params)


@pytest.mark.slow
def test_adapters_of_a_decoder():
    strings, base = language()
    p = base.given([0], max_tokens=T)
    start, _ = lora.split(lora.attach(KEY, base, rank=4, targets=("qkv", "down")))
    tasks, new = (jax.tree.map(lambda x, part=part: x[part], strings) for part in (slice(6), 6))
    options = {"spread": 0.05, "num_steps": 3, "batch_size": 3}
    training = meta.training(KEY, meta.Strings(p), start, tasks, **options)
    out = fit.run(KEY, training, optimizer=optax.adam(2e-2), num_steps=60, progress=False)
    loss = out.history["loss"]
    assert loss[-10:].mean() < loss[:10].mean() - 5
    # Of a task never seen half of the strings are what it adapts to.
    seen, rest = (jax.tree.map(lambda x, i=i: x[i::2], new) for i in (0, 1))
    start_of_all = dataclasses.replace(out, best=training.params)
    first, q = (meta.posterior(of, training)(KEY, seen) for of in (start_of_all, out))
    assert jax.tree.structure(q.mean) == jax.tree.structure(start)
    law = eqx.filter_jit(meta.Strings(p))
    base, untrained, trained = (float(law(w, rest)) for w in (start, first.mean, q.mean))
    assert trained > untrained + 1 and trained > base + 10, (base, untrained, trained)


def test_bad_input():
    start = {"phi": jnp.float32(0)}
    with pytest.raises(ValueError, match="beta of at least 0.*got -1.0 and 0.01"):
        meta.training(KEY, log_likelihood, start, Y, beta=-1.0)
    with pytest.raises(ValueError, match="at least 5 tasks, a batch, got 4"):
        meta.training(KEY, log_likelihood, start, Y, batch_size=5)
    with pytest.raises(ValueError, match=r"scalar as the log likelihood .* got shape \(2,\)"):
        meta.training(KEY, log_likelihood, start, jnp.zeros((4, 2)))
