"""Linear Gaussian models of two or three variables whose posterior over graphs is known.

The prior is that of the BGe score (Geiger and Heckerman 2002): all graphs without cycles are
equally likely, and the parameters of every variable given its parents are those of a law
Sigma ~ IW(V0, n0), mu | Sigma ~ N(0, Sigma / l0) over all variables, drawn anew for each of them.
The evidence of a variable given its parents is then a ratio of two Gaussian evidences, over the
rows in which it was not set; so interventions enter too, and 3 or 25 graphs are summed.
"""

from __future__ import annotations

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from scipy.special import gammaln, logsumexp

from amortized.maps import causal

L0 = 1.0
EXTRA = 6
"""n0 = D + EXTRA, V0 = EXTRA I: Sigma is about the identity."""
SET = 4.0
"""Standard deviation of what a variable is set to."""


def graphs(d: int) -> Bool[np.ndarray, "G D D"]:
    """All directed graphs of D variables without cycles: 1, 3, 25 for D = 1, 2, 3."""
    pairs = [(i, j) for i in range(d) for j in range(d) if i != j]
    found = []
    for chosen in itertools.product([False, True], repeat=len(pairs)):
        edges = np.zeros((d, d), bool)
        for (i, j), there in zip(pairs, chosen, strict=True):
            edges[i, j] = there
        if not np.trace(np.linalg.matrix_power(np.eye(d) + edges, d) - np.eye(d)):
            found.append(edges)
    return np.array(found)


class World(eqx.Module):
    """Draws a graph, its parameters, and rows of which the last have one variable set."""

    num_variables: int = eqx.field(static=True)
    num_observed: int = eqx.field(static=True)
    num_intervened: int = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray) -> tuple[Float[Array, "N D 2"], Bool[Array, "D D"]]:
        d, num = self.num_variables, self.num_observed + self.num_intervened
        pick, law, noise_key, which_key, set_key = jax.random.split(key, 5)
        all_graphs = jnp.asarray(graphs(d))
        edges = all_graphs[jax.random.randint(pick, (), 0, len(all_graphs))]
        keys = jax.random.split(law, d)
        weights, bias, sd = jax.vmap(parameters)(keys, edges.T, jnp.arange(d))
        noise = bias + sd * jax.random.normal(noise_key, (num, d), jnp.float32)
        which = jax.random.randint(which_key, (num, 1), 0, d)
        late = jnp.arange(num)[:, None] >= self.num_observed
        given = SET * jax.random.normal(set_key, (num, d), jnp.float32)
        x, is_set = causal.propagated(weights.T, noise, (which == jnp.arange(d)) & late, given)
        return jnp.stack([x, is_set], 2), edges


def parameters(
    key: PRNGKeyArray, parents: Bool[Array, " D"], j: Array
) -> tuple[Float[Array, " D"], Float[Array, ""], Float[Array, ""]]:
    """Weights, bias and standard deviation of variable j given its parents, from the prior."""
    first, second = jax.random.split(key)
    d = len(parents)
    # The precision of Sigma is a sum of n0 squares, for n0 is a whole number.
    rows = jax.random.normal(first, (d + EXTRA, d), jnp.float32)
    sigma = jnp.linalg.inv(rows.T @ rows / EXTRA)
    mu = jnp.linalg.cholesky(sigma / L0) @ jax.random.normal(second, (d,), jnp.float32)
    both = parents[:, None] & parents
    weights = jnp.linalg.solve(
        jnp.where(both, sigma, jnp.eye(d)), jnp.where(parents, sigma[:, j], 0)
    )
    return weights, mu[j] - weights @ mu, jnp.sqrt(sigma[j, j] - weights @ sigma[:, j])


def log_evidence(x: Float[np.ndarray, "N Q"]) -> float:
    """log p of rows of Q of the variables, under the prior."""
    num, q = x.shape
    if not q:
        return 0.0
    degrees = EXTRA + q
    mean = x.mean(0) if num else np.zeros(q)
    shrunk = L0 * num / (L0 + num) * np.outer(mean, mean)
    after = EXTRA * np.eye(q) + (x - mean).T @ (x - mean) + shrunk
    return float(
        -num * q / 2 * np.log(np.pi)
        + gammaln((degrees + num - np.arange(q)) / 2).sum()
        - gammaln((degrees - np.arange(q)) / 2).sum()
        + degrees / 2 * q * np.log(EXTRA)
        - (degrees + num) / 2 * np.linalg.slogdet(after)[1]
        + q / 2 * np.log(L0 / (L0 + num))
    )


def score(data: Float[np.ndarray, "N D 2"], edges: Bool[np.ndarray, "D D"]) -> float:
    """log p(data | graph), given what variables were set to."""
    x, is_set = np.asarray(data, np.float64)[..., 0], np.asarray(data)[..., 1] > 0
    total = 0.0
    for j in range(x.shape[1]):
        rows, parents = x[~is_set[:, j]], np.flatnonzero(edges[:, j])
        family = np.append(parents, j)
        total += log_evidence(rows[:, family]) - log_evidence(rows[:, parents])
    return total


def posterior(data: Float[np.ndarray, "N D 2"]) -> Float[np.ndarray, " G"]:
    """The probability of each of `graphs`."""
    scores = np.array([score(data, edges) for edges in graphs(data.shape[1])])
    return np.exp(scores - logsumexp(scores))


def marginals(data: Float[np.ndarray, "N D 2"]) -> Float[np.ndarray, "D D"]:
    """The exact probability of every edge."""
    return np.tensordot(posterior(data), graphs(data.shape[1]), 1)
