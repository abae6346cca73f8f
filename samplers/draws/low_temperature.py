"""Low-temperature sampling: every token from p(. | x_<t)^alpha, normalised token by token.

The law of a string is known,

    q(x) = prod_t p(x_t | x_<t)^alpha / Z_t(x_<t)        Z_t = sum_v p(v | x_<t)^alpha

and it is not p^alpha / Z: that one weighs a token by the sum over futures of their powers, this one
by the power of their sum (arXiv 2510.14901).  The ratio p^alpha / q = prod_t Z_t is an importance
weight: `importance.run` with the proposal `proposals.Powered()` has it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ppl.checks import check_count
from ppl.target import Target

from ..base import Guarantee
from ..registry import sampler
from ..results import Draws
from ..strings import growing
from ..strings.growing import complete
from ..strings.ladders import check_alpha
from ..strings.proposals import Powered
from ..strings.regeneration import drawn, keys_at, no_strings, start


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/draws/test_low_temperature.py")
def run(key: PRNGKeyArray, target: Target, *, num_samples: int = 32) -> Draws:
    """Draw strings token by token at temperature 1 / alpha, in one jit.

    The strings' own law q is exactly known, but it is no target that anybody wants; for p^alpha
    this is a heuristic.

        low_temperature.run(key, p**4)          # temperature 1/4

    Args:
        key: typed key.
        target: p^alpha.
        num_samples: N; a larger N keeps the strings of a smaller one.

    Raises:
        ValueError: unless alpha > 0 and num_samples >= 1, or if the target has a potential, which
            this law ignores.
    """
    check_count("num_samples", num_samples)
    check_power(target)
    return _run(key, target, num_samples)


def check_power(target: Target) -> None:
    """Raise ValueError unless the target is p^alpha with alpha > 0 and nothing else."""
    check_alpha(target)
    if target.tilted:
        raise ValueError(
            "expected p**alpha without a potential, got a target with one, which would be ignored;"
            " use smc.run"
        )


@functools.partial(jax.jit, static_argnums=2)
def _run(key: Any, target: Target, num: int) -> Draws:
    proposal = Powered()
    first = start(target, proposal, no_strings(target, proposal, num), jnp.ones(num, bool))
    g = complete(keys_at(jax.random.split(key, num)), target, proposal, first)
    y = drawn(g)
    return Draws(
        samples=y.sequences,
        log_prob=y.log_prob,
        log_q=y.log_q.sum(1),
        cost=growing.cost(target, proposal, g),
    )
