"""Which variable acts on which: a network from a table of observations to probabilities of edges
(Lorch et al. 2022, AVICI, arXiv 2205.12934).

    training = causal.training(key, causal.LinearGaussian(num_variables=5))
    edges = causal.edges(fit.run(key, training, optimizer=optax.adam(3e-4), num_steps=20_000))
    edges(data)                 # data [N, D, 2]: values, and 1 where it was set by intervention

Attention goes in turn over observations and over variables, so that neither order matters, and
logit_ij = exp(temperature) cos(u_i, v_j) + bias.  What is learned is

    mean over i != j of  -log q(g_ij | data)  +  dual * rho(q)

with the spectral radius rho of the matrix of probabilities, which is 0 exactly if it has no cycle,
and a dual variable that rises as long as it is not.

HEURISTIC: with dual = 0 the optimum has the marginal probability of every edge under the posterior
over graphs, and nothing else of it: edges are drawn independently, and a draw may have cycles.  The
dual moves the optimum away from the marginals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ppl.checks import check_counts, check_key
from ppl.showing import shown

from ..fit import Fitted
from ..posteriors.summaries import Block
from ..training import Training

Sample = Callable[[PRNGKeyArray], tuple[Float[Array, "N D 2"], Bool[Array, "D D"]]]
"""key -> data and the graph that they come from: edges[i, j] says that i acts on j."""


class Network(eqx.Module):
    """data [N, D, 2] -> logits [D, D] of edges from i to j; those on the diagonal mean nothing."""

    enter: eqx.nn.Linear
    blocks: list[tuple[Block, Block]]
    norm: eqx.nn.LayerNorm
    heads: tuple[eqx.nn.Linear, eqx.nn.Linear]
    log_temperature: Float[Array, ""]
    bias: Float[Array, ""]

    def __init__(self, key: PRNGKeyArray, num_blocks: int, width: int, num_heads: int):
        first, second, third, *keys = jax.random.split(key, 3 + 2 * num_blocks)
        self.enter = eqx.nn.Linear(2, width, key=first)
        self.blocks = [
            (Block(a, width, num_heads), Block(b, width, num_heads))
            for a, b in zip(keys[::2], keys[1::2], strict=True)
        ]
        self.norm = eqx.nn.LayerNorm(width)
        self.heads = (
            eqx.nn.Linear(width, width, key=second),
            eqx.nn.Linear(width, width, key=third),
        )
        self.log_temperature, self.bias = jnp.float32(0), jnp.float32(-3)

    def __call__(self, data: Float[Array, "N D 2"]) -> Float[Array, "D D"]:
        rows, columns = (jnp.ones(num, bool) for num in data.shape[:2])
        values = jax.vmap(jax.vmap(self.enter))(data)
        for over_rows, over_columns in self.blocks:
            values = jax.vmap(over_rows, (1, None), 1)(values, rows)
            values = jax.vmap(over_columns, (0, None))(values, columns)
        pooled = jax.vmap(self.norm)(values.max(0))
        u, v = (_unit(jax.vmap(head)(pooled)) for head in self.heads)
        return jnp.exp(self.log_temperature) * (u @ v.T) + self.bias


def spectral_radius(matrix: Float[Array, "D D"], *, num_iterations: int = 10) -> Float[Array, ""]:
    """The largest absolute eigenvalue of a matrix without negative entries, by power iteration.

    It iterates G + G^2, which has the same vectors as G and no period: of G itself two variables
    that act on each other would be swapped for ever.  With the left and right vectors u and v, held
    fixed, the value is u'Gv / u'v and its gradient u v' / u'v; where there is no cycle both vanish
    after D iterations, and value and gradient are 0.
    """
    fixed = jax.lax.stop_gradient(matrix)
    iterated = fixed + fixed @ fixed

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        u, v = carry
        return (_unit(u @ iterated), _unit(iterated @ v)), None

    start = jnp.ones(len(matrix), matrix.dtype)
    num = max(num_iterations, len(matrix))
    (u, v), _ = jax.lax.scan(step, (start, start), None, num)
    overlap = u @ v
    return jnp.where(overlap > 0, u @ matrix @ v / jnp.where(overlap > 0, overlap, 1), 0)


def probabilities(logits: Float[Array, "D D"]) -> Float[Array, "D D"]:
    """Of every edge; of a variable to itself 0."""
    return jnp.where(jnp.eye(len(logits), dtype=bool), 0, jax.nn.sigmoid(logits))


@shown
class Graphs(NamedTuple):
    """A step's graphs: data [B, N, D, 2], edges [B, D, D], and the weight of the cycles."""

    data: Float[Array, "B N D 2"]
    edges: Bool[Array, "B D D"]
    dual: Float[Array, ""]


def edge_loss(
    params: Network, key: PRNGKeyArray, batch: Graphs
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean log-loss of an edge, and dual times the mean spectral radius."""
    del key
    logits = jax.vmap(params)(batch.data)
    off = ~jnp.eye(logits.shape[-1], dtype=bool)
    each = optax.sigmoid_binary_cross_entropy(logits, batch.edges.astype(logits.dtype))
    log_loss = jnp.where(off, each, 0).sum() / (off.sum() * len(logits))
    radius = jax.vmap(spectral_radius)(jax.vmap(probabilities)(logits)).mean()
    return log_loss + batch.dual * radius, {"log_loss": log_loss, "radius": radius}


class LinearGaussian(eqx.Module):
    """Linear models x_j = b_j + sum_i w_ij x_i + e_j over random orders of the variables.

    Every edge that the order allows is there with the same probability, on average `num_edges` for
    each variable; |w| ~ U(1, 3) with either sign, b ~ U(-3, 3), noise of standard deviation
    U(.2, 2).  Of the rows some have one variable set to U(-5, 5).  Columns are standardised, for
    otherwise variances tell the order.
    """

    num_variables: int = eqx.field(static=True)
    num_observed: int = eqx.field(static=True, default=40)
    num_intervened: int = eqx.field(static=True, default=20)
    num_edges: float = eqx.field(static=True, default=1.0)

    def __call__(self, key: PRNGKeyArray) -> tuple[Float[Array, "N D 2"], Bool[Array, "D D"]]:
        d, num = self.num_variables, self.num_observed + self.num_intervened
        keys = jax.random.split(key, 8)
        place = jax.random.permutation(keys[0], d)
        share = min(1.0, 2 * self.num_edges / max(d - 1, 1))
        edges = (place[:, None] < place) & jax.random.bernoulli(keys[1], share, (d, d))
        size = jax.random.uniform(keys[2], (d, d), jnp.float32, 1, 3)
        weights = edges * size * jax.random.rademacher(keys[3], (d, d), jnp.float32)
        bias = jax.random.uniform(keys[4], (d,), jnp.float32, -3, 3)
        sd = jax.random.uniform(keys[5], (d,), jnp.float32, 0.2, 2)
        noise = bias + sd * jax.random.normal(keys[6], (num, d), jnp.float32)
        first, second = jax.random.split(keys[7])
        which = jax.random.randint(first, (num, 1), 0, d)
        late = jnp.arange(num)[:, None] >= self.num_observed
        given = jax.random.uniform(second, (num, d), jnp.float32, -5, 5)
        x, is_set = propagated(weights, noise, (which == jnp.arange(d)) & late, given)
        spread = x.std(0)
        x = (x - x.mean(0)) / jnp.where(spread > 0, spread, 1)
        return jnp.stack([x, is_set], 2), edges


def propagated(
    weights: Float[Array, "D D"],
    noise: Float[Array, "N D"],
    is_set: Bool[Array, "N D"],
    given: Float[Array, "N D"],
) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
    """Rows x = x W + noise over a graph without cycles, in which what `is_set` is as `given`; and
    `is_set` as numbers.
    """
    x = jnp.zeros_like(noise)
    # A path has at most D variables.
    for _ in range(len(weights)):
        x = jnp.where(is_set, given, x @ weights + noise)
    return x, is_set.astype(x.dtype)


@shown
class Dual(NamedTuple):
    """The weight of the cycles, and the spectral radius as it was of late."""

    weight: Float[Array, ""]
    radius: Float[Array, ""]


class Draw(eqx.Module):
    """Graphs with their data; the dual rises by the averaged spectral radius."""

    sample: Sample
    batch_size: int = eqx.field(static=True)
    dual_rate: float = eqx.field(static=True)
    decay: float = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray, network: Network, dual: Dual) -> tuple[Graphs, Dual]:
        data, edges = jax.vmap(self.sample)(jax.random.split(key, self.batch_size))
        if self.dual_rate:
            logits = jax.vmap(network)(data)
            now = jax.vmap(spectral_radius)(jax.vmap(probabilities)(logits)).mean()
            radius = self.decay * dual.radius + (1 - self.decay) * now
            dual = Dual(
                jnp.float32(dual.weight + self.dual_rate * radius), radius.astype(jnp.float32)
            )
        return Graphs(data, edges, dual.weight), dual


def training(
    key: PRNGKeyArray,
    sample: Sample,
    *,
    num_blocks: int = 4,
    width: int = 32,
    num_heads: int = 4,
    batch_size: int = 16,
    dual_rate: float = 1e-4,
    decay: float = 0.99,
) -> Training:
    """What `fit.run` minimises to learn the edges of the graphs that `sample` draws; HEURISTIC.

    Args:
        key: for the network's start.
        sample: key -> data [N, D, 2] and edges [D, D], for example a `LinearGaussian`.
        num_blocks: pairs of attentions, one over observations and one over variables.
        width, num_heads: theirs.
        batch_size: graphs to a step.
        dual_rate: of the weight of cycles, which starts at 0; with 0 the optimum has the exact
            marginals.
        decay: of the average of the spectral radius.

    Raises:
        ValueError: if a count is not positive, the heads do not share the width evenly, or what is
            drawn has other shapes.
    """
    check_key(key)
    check_counts(num_blocks=num_blocks, width=width, num_heads=num_heads, batch_size=batch_size)
    if width % num_heads:
        raise ValueError(f"expected a width that {num_heads} heads share evenly, got {width}")
    data, edges = (leaf.shape for leaf in jax.eval_shape(sample, key))
    d = data[1] if len(data) == 3 else 0
    if data[2:] != (2,) or edges != (d, d):
        raise ValueError(
            f"expected data [N, D, 2] (values, set or not) and edges [D, D], got {data} and {edges}"
        )
    network = Network(key, num_blocks, width, num_heads)
    start = Dual(jnp.float32(0), jnp.float32(0))
    return Training(network, Draw(sample, batch_size, dual_rate, decay), edge_loss, start)


def edges(out: Fitted) -> Callable[[Float[Array, "N D 2"]], Float[Array, "D D"]]:
    """What a run has learned: data -> the probability that i acts on j; compiled."""
    return eqx.Partial(_edges, out.best)


@eqx.filter_jit
def _edges(network: Network, data: Float[Array, "N D 2"]) -> Float[Array, "D D"]:
    return probabilities(network(data))


def _unit(rows: Float[Array, "*B W"]) -> Float[Array, "*B W"]:
    """Of length one; what is zero stays so."""
    squares = jnp.sum(rows**2, -1, keepdims=True)
    # The gradient of a square root at zero would be infinite.
    return jnp.where(squares > 0, rows * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
