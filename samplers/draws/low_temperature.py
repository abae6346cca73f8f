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
from jaxtyping import PRNGKeyArray

from ppl.checks import check_count
from ppl.target import Target

from ..base import Guarantee
from ..registry import sampler
from ..results import Draws
from ..strings import costs, growing
from ..strings.ladders import check_alpha
from ..strings.proposals import Powered
from ..strings.regeneration import keys_at


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
    keys_of = keys_at(jax.random.split(key, num))
    x = growing.complete(keys_of, target, proposal, growing.start(target, proposal, num))
    return Draws(
        samples=x.sequences,
        log_prob=x.log_prob,
        log_q=x.log_q,
        cost=costs.prompt(target, proposal) + costs.of_round(target, proposal, x),
    )
