"""Importance sampling: SMC that never resamples; independent draws, whose weights degenerate as
strings grow.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import PRNGKeyArray

from ppl.target import Target

from ..base import Guarantee
from ..registry import sampler
from ..results import Weighted
from ..strings.proposals import Law, Proposal, locally_optimal
from . import sequential as smc


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_importance.py")
def run(
    key: PRNGKeyArray,
    target: Target | Sequence[Target],
    *,
    num_particles: int = 32,
    proposal: Proposal | Law = locally_optimal,
) -> Weighted:
    """`num_particles` independent strings drawn token by token from `proposal`, weighed for
    `target`.

    Arguments, result and errors as in `smc.run`.
    """
    return smc.run(key, target, num_particles=num_particles, proposal=proposal, threshold=0.0)
