"""Best-of-n: draw n strings from the model, keep the one with the highest score."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ppl.checks import check_count
from ppl.potential import Product
from ppl.target import Target, log_potential_of

from ..base import Guarantee, holding
from ..draws import ancestral
from ..registry import sampler
from ..results import Choice
from ..strings.prompts import run_each


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_best_of_n.py")
def run(
    key: PRNGKeyArray,
    target: Target | Sequence[Target],
    *,
    num_samples: int = 32,
    batch_size: int | None = None,
) -> Choice:
    """Draw `num_samples` strings from p and keep the one with the greatest importance weight, log
    gamma - log p.

    With alpha = 1 the score is log Phi: best-of-n by reward.  There is no target: without ties the
    law of the choice is P(x) = F(s_x)^n - F(s_x^-)^n, F the distribution function of the score
    under p: `laws.best_of_n`.  `votes.best_of` has it for every n from one pool.  A constraint that
    no candidate meets leaves a best score of -inf.

    `target` may be a list of targets, of which each has its choice; then every leaf of the result
    has the list's axis first, and `batch_size` rows go through the model at a time, as in
    `ancestral.run`.

    Raises:
        ValueError: if `num_samples` < 1, or the targets of a list do not suit each other
            (`prompts.stack`).
    """
    check_count("num_samples", num_samples)
    one = holding(_run, num_samples=num_samples)
    return run_each(key, one, target, num_rows=num_samples, batch_size=batch_size)


@partial(jax.jit, static_argnames="num_samples")
def _run(key: PRNGKeyArray, target: Target, *, num_samples: int) -> Choice:
    plain = dataclasses.replace(target, alpha=None, potential=Product())
    drawn = ancestral.run(key, plain, num_samples=num_samples)
    log_phi, judged = log_potential_of(target, drawn.sequences)
    scores = target.log_prob_factor(drawn.log_prob) - drawn.log_prob + log_phi
    return Choice(
        samples=drawn.sequences,
        scores=scores,
        best=jnp.argmax(scores).astype(jnp.int32),
        cost=dataclasses.replace(
            drawn.cost,
            potential_calls=drawn.cost.tokens * target.tilted,
            judge_tokens=judged.sum(dtype=jnp.int32),
        ),
        log_prob=drawn.log_prob,
    )
