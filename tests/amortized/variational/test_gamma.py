"""Path derivatives of gamma draws against acceptance-rejection gradients and closed forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import special

from tests.docs import pages

KEY = jax.random.key(5)


def z_score(values: Any, truth: float) -> float:
    values = np.asarray(values, np.float64)
    return float((values.mean() - truth) / (values.std() / np.sqrt(values.size)))


def test_both_gradients_are_the_closed_forms():
    """Of the page's own code; and without its score the rejection is seen."""
    found: dict[str, Any] = {
        "key": KEY,
        "jax": jax,
        "jnp": jnp,
        "dist": dist,
        "print": lambda *a: None,
    }
    blocks = pages.blocks((pages.DOCS / "variational.md").read_text())
    exec(next(code for code in blocks if "log_ratio" in code), found)
    slopes, draws, e = found["slopes"], found["draws"], found["accepted"]
    trigamma = float(special.polygamma(1, 2.3))
    z = jax.vmap(lambda e: found["draw"](2.3, e))(e)
    assert abs(z_score(z, 2.3)) < 5  # the noise that was accepted is that of a gamma
    assert abs(z_score(slopes, 1.0)) < 5 and abs(z_score(slopes / draws, trigamma)) < 5
    each = jax.jit(jax.vmap(lambda e: found["gradient"](jnp.log, 2.3, e)))(e)
    assert abs(z_score(each, trigamma)) < 5 and np.std(each) / np.sqrt(len(e)) < 1e-3
    path = jax.vmap(lambda e: jax.grad(lambda a: jnp.log(found["draw"](a, e)))(2.3))(e)
    assert abs(z_score(path, trigamma)) > 20


def test_a_dirichlet_is_gammas_and_has_their_gradients():
    alpha = jnp.array([0.7, 2.0, 1.3])

    def log_z(alpha: Any, key: Any) -> Any:
        gammas = jax.random.gamma(key, alpha)
        return jnp.log(gammas / gammas.sum())

    keys = jax.random.split(KEY, 20_000)
    each = jax.jit(jax.vmap(jax.jacobian(log_z), (None, 0)))(alpha, keys)
    trigamma = special.polygamma(1, np.array([0.7, 2.0, 1.3]))
    truth = np.diag(trigamma) - special.polygamma(1, 4.0)
    for i, j in np.ndindex(3, 3):
        assert abs(z_score(each[:, i, j], truth[i, j])) < 5
