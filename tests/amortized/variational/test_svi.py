"""Training by `fit.run`: what is learned against closed forms, batches of the data, bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import Predictive, Trace_ELBO, TraceGraph_ELBO

from amortized import fit
from amortized.training import Training
from amortized.variational import svi
from amortized.variational.losses import ReweightedWakeSleep, StickingTheLanding

from . import problems
from .problems import NUM, SYMBOLS

KEY = jax.random.key(3)
X = problems.pca_data()


def trained(training: Training, num_steps: int, rate: float) -> fit.Fitted:
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    return fit.run(KEY, training, optimizer=optimizer, num_steps=num_steps, progress=False)


def level(x: Any, scaled: bool = True) -> None:
    """A global mean m ~ N(0, 2^2), x ~ N(m, 1)."""
    m = numpyro.sample("m", dist.Normal(0, 2))
    with numpyro.plate("data", NUM if scaled else len(x), subsample_size=len(x)):
        numpyro.sample("x", dist.Normal(m, 1), obs=x)


def level_guide(x: Any) -> None:
    loc = numpyro.param("loc", 0.0)
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    numpyro.sample("m", dist.Normal(loc, scale))


def test_minibatches_with_their_scale_learn_the_posterior_of_all_data():
    x = X[:, 0]
    training = svi.training(
        KEY, level, level_guide, StickingTheLanding(), data={"x": x}, batch_size=4
    )
    found = svi.values(training, trained(training, 1500, 0.05))
    precision = 1 / 4 + NUM
    assert float(found["loc"]) == pytest.approx(float(x.sum()) / precision, abs=0.02)
    # Without the scale it would be the posterior of four data, twice as wide.
    assert float(found["scale"]) == pytest.approx(precision**-0.5, rel=0.05)
    draws = Predictive(level_guide, params=found, num_samples=2)(KEY, x=x)
    assert draws["m"].shape == (2,)


def test_wake_sleep_learns_the_enumerated_posterior():
    data = {"x": jnp.asarray(SYMBOLS)}
    objective = ReweightedWakeSleep(8)
    training = svi.training(KEY, problems.symbols, problems.symbols_guide, objective, data=data)
    # The model stays as it is.
    rates = {"logit": optax.adam(optax.cosine_decay_schedule(0.1, 1500))}
    optimizer = optax.multi_transform(
        rates | {"likelihood": optax.set_to_zero()}, {name: name for name in training.params}
    )
    out = fit.run(KEY, training, optimizer=optimizer, num_steps=1500, progress=False)
    learned = jax.nn.sigmoid(svi.values(training, out)["logit"])
    np.testing.assert_allclose(learned, problems.POSTERIOR, atol=0.03)
    assert out.history["ess"][-100:].mean() > 0.99 > out.history["ess"][0]


def test_an_epoch_sees_every_row_once():
    draw = svi.Minibatches({"x": jnp.arange(NUM), "y": 2 * jnp.arange(NUM)}, 4)
    training = svi.training(
        KEY, level, level_guide, Trace_ELBO(), data={"x": X[:, 0]}, batch_size=4
    )
    cursor, orders = training.data, []
    for epoch in range(2):
        seen = []
        for key in jax.random.split(jax.random.fold_in(KEY, epoch), 3):
            batch, cursor = draw(key, None, cursor)
            np.testing.assert_array_equal(batch["y"], 2 * batch["x"])
            seen += batch["x"].tolist()
        assert sorted(seen) == list(range(NUM))
        orders.append(seen)
    assert orders[0] != orders[1]
    assert svi.training(KEY, level, level_guide, Trace_ELBO(), data={"x": X[:, 0]}).data is None


def categorical_guide(x: Any) -> None:
    numpyro.sample("m", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(3))))


def wrong_plate(x: Any) -> None:
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 1).expand([2]).to_event(1))


@pytest.mark.bad_input
def test_what_cannot_be_learned_is_refused():
    x = {"x": X[:, 0]}

    def asked(model: Any = level, guide: Any = level_guide, data: Any = x, **how: Any) -> Training:
        return svi.training(KEY, model, guide, how.pop("objective", Trace_ELBO()), data=data, **how)

    with pytest.raises(ValueError, match="same number of rows"):
        asked(data=x | {"y": jnp.zeros(3)})
    with pytest.raises(ValueError, match="same number of rows"):
        asked(data={})
    with pytest.raises(ValueError, match="NaN or infinite values in \\['x'\\]"):
        asked(data={"x": X[:, 0].at[2].set(jnp.nan)})
    with pytest.raises(ValueError, match="at most the 12 rows"):
        asked(batch_size=13)
    with pytest.raises(ValueError, match="3 times its rows, beside what is global, \\['m'\\]"):
        asked(lambda x: level(x, scaled=False), batch_size=4)
    with pytest.raises(ValueError, match="z to count as often .* 3 times, got 1"):
        asked(problems.pca, wrong_plate, {"x": X}, batch_size=4)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="derivatives for Trace_ELBO"):
        asked(level, categorical_guide)
    asked(level, categorical_guide, objective=TraceGraph_ELBO())
    with pytest.raises(ValueError, match="a training of svi.training"):
        svi.values(Training({}, lambda *a: a, lambda *a: a), None)
    with pytest.raises(ValueError, match="minibatches in plates that all sites share"):
        svi.log_weights(KEY, level, level_guide, {"loc": 0.0, "scale": 1.0}, {"x": X[:4, 0]}, 2)
