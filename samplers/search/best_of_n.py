"""Best-of-n: draw n strings from the model, keep the one with the highest score."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.potential import Product
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.target import Target

from ..base import Cost, Guarantee
from ..draws import ancestral
from ..registry import sampler


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
    """n candidates, their scores [n], the index [] of the best one (the first of equals), and what
    it took.

    The cost includes the forward passes that score the candidates.
    """

    sequences: Sequences
    scores: Float[Array, " n"]
    best: Int[Array, ""]
    cost: Cost


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_best_of_n.py")
def run(key: PRNGKeyArray, target: Target, *, num_samples: int = 32) -> Result:
    """Draw `num_samples` strings from p and keep the one with the greatest importance weight, log
    gamma - log p.

    With alpha = 1 the score is log Phi: best-of-n by reward.  There is no target: without ties the
    law of the choice is P(x) = F(s_x)^n - F(s_x^-)^n, F the distribution function of the score
    under p.  A constraint that no candidate meets leaves a best score of -inf.

    Raises:
        ValueError: if `num_samples` < 1.
    """
    check_count("num_samples", num_samples)
    return _run(key, target, num_samples)


@partial(jax.jit, static_argnums=2)
def _run(key: PRNGKeyArray, target: Target, num_samples: int) -> Result:
    plain = dataclasses.replace(target, alpha=None, potential=Product())
    x = ancestral.run(key, plain, num_samples=num_samples)
    log_p = target.token_log_probs(x.tokens, x.length)
    scores = (target.log_prob_factor(log_p) - log_p).sum(1) + target.log_potential(
        x.tokens, x.length
    )
    drawn = ancestral.cost(x)
    calls = drawn.tokens if target.tilted else jnp.int32(0)
    spent = drawn + Cost(forwards=jnp.int32(target.max_tokens - 1), potential_calls=calls)
    return Result(x, scores, jnp.argmax(scores).astype(jnp.int32), spent)
