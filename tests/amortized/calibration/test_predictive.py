"""Normal data of a known spread: the law of replications is known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from amortized.calibration import predictive

NUM, SAMPLES = 50, 2_000


def replicate(key: Any, theta: Any) -> Any:
    return theta + jax.random.normal(key, (NUM,))


def quantities(theta: Any, x: Any) -> dict[str, Any]:
    return {
        "mean": x.mean(),
        "variance": x.var(),
        "misfit": ((x - theta) ** 2).sum(),
        "ties": jnp.float32(1),
    }


def test_p_values_are_those_of_the_law_of_replications():
    x = 1.3 * np.random.default_rng(1).standard_normal(NUM)
    theta = x.mean() + np.random.default_rng(2).standard_normal(SAMPLES) / NUM**0.5
    out = predictive.run(jax.random.key(1), replicate, theta, x, quantities)
    assert out.names == ("mean", "misfit", "ties", "variance")
    assert out.observed.shape == out.replicated.shape == (SAMPLES, 4)
    of = dict(zip(out.names, out.p_values, strict=True))
    variance = stats.chi2.sf(NUM * x.var(), NUM - 1)
    misfit = stats.chi2.sf(((x - theta[:, None]) ** 2).sum(1), NUM).mean()
    assert 0.01 < variance < 0.3
    for name, p in (("mean", 0.5), ("variance", variance), ("misfit", misfit)):
        assert abs(of[name] - p) < 4 * (p * (1 - p) / SAMPLES) ** 0.5, (name, of[name], p)
    assert of["ties"] == 0.5 and (out.two_sided <= 1).all()


def test_bad_input():
    theta, x = np.zeros(4), np.zeros(NUM)
    with pytest.raises(ValueError, match="replications like the observation"):
        predictive.run(jax.random.key(0), replicate, theta, x[None], quantities)
    with pytest.raises(ValueError, match="got 4 of 4 with NaN"):
        predictive.run(
            jax.random.key(0), lambda key, theta: jnp.full(NUM, jnp.nan), theta, x, quantities
        )
