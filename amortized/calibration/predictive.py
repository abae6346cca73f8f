"""Posterior predictive checks: would data like these have come of the posterior?

    theta_s ~ posterior(. | x_o),   x_s ~ p(x | theta_s),   p = P(T(theta_s, x_s) > T(theta_s, x_o))

A p near 0 or 1 says that the model, at the parameters that the data leave, does not make such
data: too few zeros, too little spread.  The data are used twice, so p keeps nearer to 1/2 than a
uniform number does: it misses more than it should, and accuses rarely.

Gelman, Meng and Stern (1996).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, PyTree

from ppl.checks import check_function, check_key
from ppl.pytrees import as_pytree
from ppl.showing import shown

from .joint import Joint, Quantity, evaluate, finite_rows


@shown
@dataclasses.dataclass(frozen=True)
class Predictive:
    """Quantities of data and of their replications, for S draws of the posterior.

    Attributes:
        names: of the K quantities.
        observed: [S, K] T(theta_s, x_o); all rows alike if T does not look at theta.
        replicated: [S, K] T(theta_s, x_s).
        p_values: [K] the share of draws with replicated above observed, equals counted half.
    """

    names: tuple[str, ...]
    observed: Float[np.ndarray, "S K"]
    replicated: Float[np.ndarray, "S K"]
    p_values: Float[np.ndarray, " K"]

    @property
    def two_sided(self) -> Float[np.ndarray, " K"]:
        """2 min(p, 1 - p)."""
        return 2 * np.minimum(self.p_values, 1 - self.p_values)


def run(
    key: PRNGKeyArray,
    replicate: Callable[[PRNGKeyArray, Any], Any],
    theta: PyTree,
    x: PyTree,
    quantities: Quantity,
) -> Predictive:
    """Compare an observation with what posterior draws generate.

    Args:
        key: typed key.
        replicate: (key, theta) -> x, the simulator at one theta; traced.
        theta: S posterior draws, leaves [S, ...].
        x: the observation.
        quantities: (theta, x) -> {name: number []}; traced.

    Raises:
        ValueError: if the replications are not like the observation or not finite, or a quantity is
            NaN.
    """
    check_key(key)
    check_function("replicate", replicate, "(key, theta)", "your simulator")
    num = jax.tree.leaves(theta)[0].shape[0]
    made = jax.jit(jax.vmap(as_pytree(replicate)))(jax.random.split(key, num), theta)
    got, wanted = (
        [np.shape(leaf)[skip:] for leaf in jax.tree.leaves(tree)]
        for tree, skip in ((made, 1), (x, 0))
    )
    if got != wanted:
        raise ValueError(
            f"expected replications like the observation, got shapes {got} beside {wanted}; x is"
            " one observation, without an axis in front"
        )
    bad = ~finite_rows(made)
    if bad.any():
        raise ValueError(
            f"expected finite replications, got {bad.sum()} of {num} with NaN or infinity; leave"
            " those theta out and say so, or mend the simulator"
        )
    seen = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num, *np.shape(leaf))), x)
    them = [
        evaluate(Joint(theta, rows, jax.tree.map(lambda leaf: leaf[:, None], theta)), quantities)
        for rows in (seen, made)
    ]
    observed, replicated = them[0].truth, them[1].truth
    above = (replicated > observed).mean(axis=0) + 0.5 * (replicated == observed).mean(axis=0)
    return Predictive(them[0].names, observed, replicated, above)
