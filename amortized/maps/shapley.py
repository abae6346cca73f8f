"""Shapley values: what each part of an input contributes, exactly for a few parts, and by a network
for many inputs (Jethani et al. 2022, arXiv 2107.07436).

    phi = shapley.exact(lambda coalition: ..., d)            # [D], from all 2^D coalitions
    training = shapley.training(key, value, rows)            # value(x, coalition) -> a number
    explain = shapley.explainer(fit.run(key, training, ...), value)
    explain(x)                                               # [D], one pass of the network

A game v gives every coalition S of D players a number.  The Shapley value of a player is what it
adds, the mean over all orders in which the players may come,

    phi_i = sum_{S without i} |S|! (D - |S| - 1)! / D! (v(S + i) - v(S))

and is also the solution of a regression: under the law of coalitions mu(S) in proportion to
(D - 1) / (C(D, |S|) |S| (D - |S|)), proper ones only,

    phi = argmin E (v(S) - v(none) - sum_{i in S} phi_i)^2    where sum_i phi_i = v(all) - v(none)

which a network of x can learn.  The constraint is kept by adding the same number to all phi_i.
Without it, or with a factor in the place of the summand, the optimum is another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ppl.checks import check_counts, check_key
from ppl.rows import take_rows
from ppl.showing import shown

from ..fit import Fitted
from ..posteriors.summaries import Standardised
from ..training import Training

MOST = 12
"""The most players of `exact`: 4096 coalitions."""
AT_ONCE = 256
"""Coalitions whose values `exact` asks for together."""

Value = Callable[[PyTree, Bool[Array, " D"]], Float[Array, ""]]
"""(x, coalition) -> what the model gives where only the players in the coalition are seen."""

Explainer = Callable[[PyTree], Float[Array, " D"]]
"""x -> a number for each player, before they are made to sum to v(all) - v(none)."""


def exact(value: Callable[[Bool[Array, " D"]], Any], d: int) -> Float[Array, " D"]:
    """Shapley values of a game of D players, from the values of all 2^D coalitions; EXACT.

    Args:
        value: coalition [D] -> a number, in JAX.
        d: D.

    Raises:
        ValueError: if D is not within 1 and 12, or a value is no scalar.

    >>> exact(lambda s: 3.0 * s[0] + 2.0 * (s[0] & s[1]), 2).tolist()
    [4.0, 1.0]
    """
    check_counts(d=d)
    if d > MOST:
        raise ValueError(
            f"expected at most {MOST} players, whose {2**MOST} coalitions are all asked for, got"
            f" d={d}; put parts of the input together, or train a network (shapley.training)"
        )
    found = jax.eval_shape(value, jax.ShapeDtypeStruct((d,), bool))
    if found.shape != ():
        raise ValueError(
            f"expected a number as the value of a coalition, got shape {found.shape}; take one"
            " class, or one log-probability, at a time"
        )
    return _exact(value, d)


@eqx.filter_jit
def _exact(value: Callable[[Bool[Array, " D"]], Any], d: int) -> Float[Array, " D"]:
    members = (np.arange(2**d)[:, None] >> np.arange(d)) & 1 == 1
    sizes = members.sum(1)
    values = jax.lax.map(value, jnp.asarray(members), batch_size=AT_ONCE)
    # v(S) counts for i in S as the larger coalition, and against all others as the smaller one.
    inside = np.array([1 / (d * math.comb(d - 1, max(k - 1, 0))) for k in range(d + 1)])
    outside = np.array([1 / (d * math.comb(d - 1, min(k, d - 1))) for k in range(d + 1)])
    counts = np.where(members, inside[sizes, None], -outside[sizes, None])
    return values @ jnp.asarray(counts, jnp.result_type(values, jnp.float32))


def coalitions(key: PRNGKeyArray, num_pairs: int, d: int) -> Bool[Array, "K D"]:
    """Draws of the Shapley kernel, each followed by its complement, which has the same law:
    K = 2 num_pairs rows, the first half and what is not in it.
    """
    first, second = jax.random.split(key)
    sizes = np.arange(1, d)
    log_law = -jnp.log(jnp.asarray(sizes * (d - sizes), jnp.float32))
    size = 1 + jax.random.categorical(first, log_law, shape=(num_pairs, 1))
    places = jax.random.uniform(second, (num_pairs, d)).argsort(1).argsort(1)
    members = places < size
    return jnp.concatenate([members, ~members])


def additive(phi: Float[Array, "*B D"], total: Float[Array, "*B"]) -> Float[Array, "*B D"]:
    """The same number added to every player, so that they sum to the total."""
    return phi + ((total - phi.sum(-1)) / phi.shape[-1])[..., None]


@shown
class Games(NamedTuple):
    """A step's games.

    x: B inputs.  coalitions: K of each.  gains: v(S) - v(none).  total: v(all) - v(none).
    """

    x: PyTree
    coalitions: Bool[Array, "B K D"]
    gains: Float[Array, "B K"]
    total: Float[Array, " B"]


def loss(
    params: Explainer, key: PRNGKeyArray, batch: Games
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The squared errors of sums of contributions, the mean over coalitions and inputs.

    The metric `unexplained` is their share of the mean square of v(S) - v(none).  Over coalitions
    from the Shapley kernel a network that can give any number for any x is CONSISTENT.
    """
    del key
    phi = additive(jax.vmap(params)(batch.x), batch.total)
    rest = batch.gains - jnp.einsum("bkd,bd->bk", batch.coalitions.astype(phi.dtype), phi)
    error, most = (rest**2).mean(), (batch.gains**2).mean()
    return error, {"unexplained": error / jnp.where(most > 0, most, 1)}


class Masked(eqx.Module):
    """The game of a function of numbers: what is not in the coalition has its baseline's value."""

    function: Callable[[Float[Array, " D"]], Any]
    baseline: Float[Array, " D"]

    def __call__(self, x: Float[Array, " D"], coalition: Bool[Array, " D"]) -> Any:
        return self.function(jnp.where(coalition, x, self.baseline))


class Dense(eqx.Module):
    """An MLP of D numbers, each standardised, to D numbers."""

    standard: Standardised
    network: eqx.nn.MLP

    def __call__(self, x: Float[Array, " D"]) -> Float[Array, " D"]:
        return self.network(self.standard(x))


class Draw(eqx.Module):
    """Inputs out of those that are given, and coalitions of each with their values."""

    value: Value
    rows: PyTree
    num_players: int = eqx.field(static=True)
    num_pairs: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray, params: Any, data: None) -> tuple[Games, None]:
        del params
        d = self.num_players
        pick, key = jax.random.split(key)
        num = jax.tree.leaves(self.rows)[0].shape[0]
        x = take_rows(self.rows, jax.random.randint(pick, (self.batch_size,), 0, num, jnp.int32))
        keys = jax.random.split(key, self.batch_size)
        drawn = jax.vmap(lambda key: coalitions(key, self.num_pairs, d))(keys)
        ends = jnp.broadcast_to(jnp.array([[False], [True]]), (self.batch_size, 2, d))
        asked = jnp.concatenate([ends, drawn], axis=1)
        values = jax.vmap(lambda x, rows: jax.vmap(lambda s: self.value(x, s))(rows))(x, asked)
        gains = values[:, 1:] - values[:, :1]
        return Games(x, drawn, gains[:, 1:], gains[:, 0]), data


def training(
    key: PRNGKeyArray,
    value: Value,
    rows: PyTree,
    *,
    network: Explainer | None = None,
    num_pairs: int = 8,
    batch_size: int = 32,
) -> Training:
    """What `fit.run` minimises to learn the Shapley values of every input; CONSISTENT.

    Args:
        key: for the network's start.
        value: (x, coalition [D]) -> a number, in JAX; a pytree if it holds a model's weights.
        rows: inputs, N rows of every leaf; no labels are needed.
        network: x -> [D]; if None an MLP of D numbers, and the players are these numbers.
        num_pairs: coalitions of each input in a step, each with its complement.
        batch_size: inputs to a step.

    Raises:
        ValueError: if a count is not positive, there are fewer than two players, rows are no array
            [N, D] and there is no network, or a value is no scalar.
    """
    check_key(key)
    check_counts(num_pairs=num_pairs, batch_size=batch_size)
    if network is None:
        if not hasattr(rows, "ndim") or rows.ndim != 2:
            raise ValueError(
                "expected rows as one array [N, D], whose numbers are the players, got"
                f" {jax.tree.map(jnp.shape, rows)}; pass network=, x -> [D]"
            )
        d = rows.shape[1]
        network = Dense(Standardised(rows), eqx.nn.MLP(d, d, 64, 2, jax.nn.gelu, key=key))
    first = jax.tree.map(lambda leaf: leaf[0], rows)
    d = eqx.filter_eval_shape(network, first).shape[0]
    if d < 2:
        raise ValueError(f"expected at least two players, got {d}; one has v(all) - v(none)")
    found = eqx.filter_eval_shape(value, first, jax.ShapeDtypeStruct((d,), bool))
    if found.shape != ():
        raise ValueError(
            f"expected a number as the value of a coalition, got shape {found.shape}; give the"
            " class as a part of x, or take one"
        )
    return Training(network, Draw(value, rows, d, num_pairs, batch_size), loss)


def explainer(out: Fitted, value: Value) -> Explainer:
    """What a run has learned: x -> Shapley values [D], which sum to v(all) - v(none); compiled."""
    return eqx.Partial(_explain, out.best, value)


@eqx.filter_jit
def _explain(network: Explainer, value: Value, x: PyTree) -> Float[Array, " D"]:
    phi = network(x)
    total = value(x, jnp.ones(phi.shape, bool)) - value(x, jnp.zeros(phi.shape, bool))
    return additive(phi, total)
