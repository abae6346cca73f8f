"""Selection: from which probabilities ancestors are drawn, if not from the weights themselves.

A selection is a function (key, target, particles, round) -> (particles, log_probs [N], Cost).
Whatever A = softmax of its log_probs is, resampling carries the ratio W / A, so it changes the
variance of a run and not its law, as long as A is positive wherever W is.  It may make the forward
pass for the next token, which is then not made again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.pytrees import as_pytree
from ppl.rows import log_normalised
from ppl.steps import Steps
from ppl.target import Target

from ..base import Cost, Particles
from ..diagnostics import ess
from . import costs
from .extending import extend
from .growing import forward
from .proposals import as_proposal, bootstrap, locally_optimal

Selection = Callable[
    [PRNGKeyArray, Target, Particles, Int[Array, ""]],
    tuple[Particles, Float[Array, " N"] | None, Cost],
]

DEFENSIVE = 0.1
"""Share of W in what a random look-ahead selects from: an unlucky glance must not take the chance
of survival away, and no weight grows by more than its inverse."""


def by_weight(
    key: PRNGKeyArray, target: Target, p: Particles, round: Int[Array, ""]
) -> tuple[Particles, None, Cost]:
    """A = W."""
    return p, None, Cost()


def annealed(temperature: float | Float[Array, ""]) -> Selection:
    """A proportional to W^(1 / temperature): above 1, fewer lineages die out, and weights even out
    more slowly.

    Raises:
        ValueError: unless temperature > 0.
    """
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(
            f"expected a temperature above 0, got {temperature}; 1 draws from the weights"
        )
    return jax.tree_util.Partial(_annealed, temperature)


def _annealed(
    temperature: float | Array, key: PRNGKeyArray, target: Target, p: Particles, round: Array
) -> tuple:
    return p, p.log_weights / temperature, Cost()


def entropic(num_rounds: int) -> Selection:
    """A proportional to W^(1 / T), T from the effective sample size (entropic annealing, arXiv
    2510.05825):

        T = max(1, (N / ESS) (1 - t / num_rounds))  while ESS < N / 2 and t < num_rounds / 2,  else
        1

    with t = 1 for the selection after the first round.
    """
    return jax.tree_util.Partial(_entropic, jnp.float32(num_rounds))


def _entropic(
    num_rounds: Array, key: PRNGKeyArray, target: Target, p: Particles, round: Array
) -> tuple:
    return p, p.log_weights / entropic_temperature(p.log_weights, round / num_rounds), Cost()


def entropic_temperature(
    log_weights: Float[Array, " N"], progress: Float[Array, ""]
) -> Float[Array, ""]:
    """The temperature of `entropic` at `progress` = t / num_rounds."""
    share = ess(log_weights) / log_weights.shape[0]
    hot = jnp.maximum(1.0, (1.0 - progress) / jnp.where(share > 0, share, 1.0))
    return jnp.where((share < 0.5) & (progress < 0.5), hot, 1.0)


def next_token(key: PRNGKeyArray, target: Target, p: Particles, round: Int[Array, ""]) -> tuple:
    """Look-ahead by one token: A proportional to W Z, Z = sum_v p(v | x)^alpha Phi(v | x) over the
    factors that are known, and are to be followed (`foresight`).

    The auxiliary particle filter of Pitt and Shephard (1999).  Z is exactly the weight that the
    locally optimal proposal earns next, so copies are made before the token is drawn and differ in
    it.  Costs no forward pass that would not be made anyway.
    """
    x, logits = forward(target, p.state)
    gain = jax.nn.logsumexp(locally_optimal(target, log_normalised(logits), x.potential), axis=1)
    return (
        dataclasses.replace(p, state=x),
        p.log_weights + jnp.where(x.active, gain, 0.0),
        # The guides' passes are made after the token, by the move.
        costs.one_pass(target, as_proposal(bootstrap), p.state),
    )


def next_step(steps: Steps | None = None) -> Selection:
    """Look-ahead by a step of text: A mostly proportional to W e^eta, eta the log-weight of one
    drawn continuation.

    Every particle draws one more step from the model, is weighed with it, and forgets it again; the
    step it goes on with is drawn afresh.  With a process reward this is look-ahead modulation
    (arXiv 2510.05825), eta = log-odds of the successor less those of the particle.  Costs as many
    tokens and forward passes again.
    """
    return jax.tree_util.Partial(_next_step, steps)


def _next_step(
    steps: Steps | None, key: PRNGKeyArray, target: Target, p: Particles, round: Array
) -> tuple:
    proposal = as_proposal(bootstrap)
    bound = None if steps is None else steps.within(target.space)
    x, dw = extend(target, proposal, bound).sample(key, dataclasses.replace(p.state, proposal=()))
    ahead = p.log_weights + dw
    mixed = jnp.logaddexp(
        _log_normalise(ahead) + jnp.log1p(-DEFENSIVE),
        _log_normalise(p.log_weights) + jnp.log(DEFENSIVE),
    )
    return p, mixed, costs.of_round(target, proposal, x)


def compose(first: Selection, second: Selection) -> Selection:
    """`second` of what `first` selects from: A is that of a population weighed by the A of `first`.

    For example look-ahead, annealed: compose(next_step(steps), entropic(num_rounds)).
    """
    return jax.tree_util.Partial(_compose, as_pytree(first), as_pytree(second))


def _compose(
    first: Selection,
    second: Selection,
    key: PRNGKeyArray,
    target: Target,
    p: Particles,
    round: Array,
) -> tuple:
    first_key, second_key = jax.random.split(key)
    p, inner, spent = first(first_key, target, p, round)
    weighed = p if inner is None else dataclasses.replace(p, log_weights=inner)
    after, outer, more = second(second_key, target, weighed, round)
    return (
        dataclasses.replace(after, log_weights=p.log_weights),
        inner if outer is None else outer,
        spent + more,
    )


def _log_normalise(log_weights: Float[Array, " N"]) -> Float[Array, " N"]:
    """log softmax, with -inf instead of NaN if every weight is zero."""
    total = jax.nn.logsumexp(log_weights)
    return jnp.where(jnp.isneginf(log_weights), -jnp.inf, log_weights - total)
