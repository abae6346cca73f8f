"""What a summary depends on, and what it does not."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import ppl
from amortized import fit
from amortized.posteriors import flows, npe, summaries
from amortized.posteriors.simulators import simulator
from models import config, transformer

KEY, M = jax.random.key(6), 6
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 32}


def repeated():
    """A mean from between 1 and 6 observations: x_m ~ N(theta, 1), of which the first `num` are."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    num = numpyro.sample("num", dist.DiscreteUniform(1, M))
    numpyro.sample("there", dist.Delta(jnp.arange(M) < num, event_dim=1))
    numpyro.sample("x", dist.Normal(theta, 1.0).expand([M]).to_event(1))


OBSERVED = ["x", "there"]


@pytest.fixture(scope="module")
def pilot():
    return simulator(repeated, latents=["theta"], observed=OBSERVED).draws(KEY, 100)


@pytest.fixture(scope="module")
def of_sets(pilot):
    read = summaries.set_transformer("x", mask="there", width=8, num_heads=2)(KEY, pilot)
    return eqx.filter_jit(read)


def test_a_set_has_no_order_and_what_is_not_there_does_not_matter(of_sets):
    x = {"x": jnp.arange(6.0) - 2, "there": jnp.array([1, 1, 1, 0, 0, 0], bool)}
    value = of_sets(x)
    order = jnp.array([4, 2, 0, 5, 1, 3])
    np.testing.assert_allclose(of_sets({k: v[order] for k, v in x.items()}), value, atol=1e-5)
    other = x | {"x": x["x"].at[3:].set(1e3)}
    np.testing.assert_allclose(of_sets(other), value, atol=1e-5)
    assert abs(of_sets(x | {"x": x["x"].at[1].set(3.0)}) - value).max() > 1e-3
    assert abs(of_sets(x | {"there": x["there"].at[3].set(True)}) - value).max() > 1e-3
    nobody = x | {"there": jnp.zeros(6, bool)}
    grads = jax.grad(lambda values: of_sets(nobody | {"x": values}).sum())(x["x"])
    assert jnp.isfinite(of_sets(nobody)).all() and (grads == 0).all()


def test_a_series_has_an_order_and_reads_numbers_and_tokens(pilot):
    of_series = summaries.sequence("x", width=8)(KEY, pilot)
    x = {"x": jnp.arange(6.0)}
    assert abs(of_series(x) - of_series({"x": x["x"][::-1]})).max() > 1e-3
    tokens = pilot._replace(x={"text": jax.random.randint(KEY, (100, 4), 0, 3)})
    of_tokens = summaries.sequence("text", width=8, vocab_size=3)(KEY, tokens)
    one, other = (of_tokens({"text": jnp.array(t)}) for t in ([0, 1, 2, 2], [1, 0, 2, 2]))
    assert one.shape == (8,) and abs(one - other).max() > 1e-3


def test_numbers_are_standardised(pilot):
    context = jax.vmap(summaries.identity()(KEY, pilot))(pilot.x)
    assert context.shape == (100, 2 * M)
    np.testing.assert_allclose(context.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(context.std(0)[-M:], 1, atol=1e-4)
    np.testing.assert_allclose(context.std(0)[0], 0, atol=1e-4)  # the first is always there


def test_an_mlp_reads_all_numbers(pilot):
    reads = summaries.mlp(size=3, width=8)(KEY, pilot)
    x = {"x": jnp.arange(6.0), "there": jnp.ones(6, bool)}
    slopes = jax.jacobian(lambda values: reads(x | {"x": values}))(x["x"])
    assert slopes.shape == (3, 6) and (abs(slopes).max(0) > 0).all()


def test_a_frozen_language_model_reads_a_text():
    lm = transformer.random(KEY, config.small(5, **SIZES), 0)
    target = lm.given(jnp.array([1, 2]), max_tokens=4)

    def model():
        numpyro.sample("theta", dist.Normal(0.0, 1.0))
        numpyro.sample("text", ppl.Text(target))

    training = npe.training(
        *(KEY, model),
        latents=["theta"],
        observed=["text"],
        flow=flows.gaussian(),
        summary=summaries.language_features("text", lm, [1, 2], size=3, width=8),
        num_simulations=40,
        batch_size=10,
    )
    reads = training.params.summary
    read = eqx.filter_jit(reads)
    text = jnp.array([3, 4, lm.eos, lm.eos])

    @jax.jit
    def passes():
        hidden = lm.features.extend(lm.features.prefill(jnp.array([1, 2])), text[None])[0]
        logits = jnp.stack([target.prefix.logits, *lm.extend(target.prefix, text[None])[0][:2]])
        return hidden, jax.nn.log_softmax(logits)

    hidden, laws = passes()
    surprise = jnp.stack([laws[jnp.arange(3), text[:3]].mean(), -(jnp.exp(laws) * laws).sum() / 3])
    expected = jnp.concatenate([hidden[:3].mean(0), hidden[2], surprise])
    np.testing.assert_allclose(
        read({"text": text}), reads.network(reads.standard(expected)), atol=1e-4
    )
    # What is stored has been read, and a text of one's own is read in the same way.
    stored = {name: leaf[0] for name, leaf in training.draw.held_out.x.items()}
    np.testing.assert_allclose(read(stored), read({"text": stored["text"]}), atol=1e-4)
    known = stored | {reads.name: jnp.zeros_like(stored[reads.name])}
    assert abs(read(known) - read(stored)).max() > 1e-3
    assert set(training.params.pilot) == {"text", reads.name}
    out = fit.run(KEY, training, optimizer=optax.adamw(0.1), num_steps=2, progress=False)
    # Weight decay too leaves what is frozen.
    before, after = (eqx.filter(t.summary.lm, eqx.is_array) for t in (training.params, out.params))
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
    assert not np.array_equal(
        out.params.summary.network.layers[0].weight, reads.network.layers[0].weight
    )


@pytest.mark.slow
@pytest.mark.optimised
def test_a_network_over_sets_learns_a_posterior_of_any_number():
    training = npe.training(
        *(KEY, repeated),
        latents=["theta"],
        observed=OBSERVED,
        flow=flows.mixture(num_components=2, width=32),
        summary=summaries.set_transformer("x", mask="there", width=16, num_blocks=1),
    )
    schedule = optax.cosine_decay_schedule(3e-3, 1500)
    out = fit.run(KEY, training, optimizer=optax.adam(schedule), num_steps=1500, progress=False)
    posterior = npe.posterior(out)
    for num in (1, 3, 6):
        x = {"x": jnp.linspace(-0.5, 1.5, M), "there": jnp.arange(M) < num}
        theta = posterior.sample(KEY, x, 4000)["theta"]
        mean, scale = x["x"][:num].sum() / (num + 1), (num + 1) ** -0.5
        assert abs(theta.mean() - mean) < 0.15 * scale
        assert abs(theta.std() - scale) < 0.1 * scale
