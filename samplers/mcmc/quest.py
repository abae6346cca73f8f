"""QUEST (arXiv 2406.00049): suffix Metropolis-Hastings for e^{r(x) / beta}, in which the model only
proposes.

Keep x_<n, draw the rest from q, the model at some temperature, and accept with probability min(1,
e^A),

    A = (r(y) - r(x)) / beta + sum_{t >= n} log q(x_t | x_<t) - log q(y_t | y_<t) + log c(n | y) -
    log c(n | x)

c the law of the cut.  The published code has means over the tokens in place of the sums, which
leaves some other law invariant.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppl.pytrees import as_pytree
from ppl.scorers import LogScore
from ppl.target import Target

from ..base import Guarantee, Kernel
from ..registry import sampler
from ..strings.cuts import Cut, uniform_in_length
from ..strings.proposals import as_proposal, tempered
from . import suffix
from .qalign import tilt


def target(p: Target, score: LogScore, *, beta: float | int | Float[Array, ""]) -> Target:
    """e^{r(x) / beta} over the strings of positive probability under p: p to the power 0, tilted.

    All strings of at most T tokens count alike but for r, so without a reward almost all of them
    have T tokens. Arguments and errors as in `qalign.target`; of p's own potential only what it
    forbids is kept.
    """
    return p**0 * tilt(score, beta)


@sampler(Guarantee.EXACT, proof="tests/samplers/mcmc/test_quest.py")
def kernel(
    p: Target,
    score: LogScore,
    *,
    beta: float | int | Float[Array, ""],
    temperature: float | int | Float[Array, ""] = 1.0,
    cut: Cut = uniform_in_length,
) -> Kernel:
    """QUEST: chains over strings that leave e^{r(x) / beta} / Z invariant; draws from p are a good
    start.

    Args:
        p: the model that proposes.
        score, beta: as in `target`.
        temperature: of the proposal, q proportional to p^(1 / temperature); published 0.8.
        cut: as in `qalign.kernel`.

    Returns:
        `Kernel`, with the state and the info of `suffix.kernel`.

    Raises:
        ValueError: unless beta > 0 and temperature > 0; by `init` as that of `suffix.kernel` does.
    """
    return suffix.kernel_of(target(p, score, beta=beta), method(temperature, cut))


def method(temperature: float | int | Float[Array, ""], cut: Cut) -> suffix.Method:
    """The options of `kernel`, bound: those of a suffix move, whose own check wants alpha > 0."""
    return suffix.Method(
        as_proposal(tempered(temperature)),
        as_pytree(cut),
        jnp.float32(jnp.inf),
        early_rejection=True,
    )
