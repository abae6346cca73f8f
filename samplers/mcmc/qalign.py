"""QAlign (arXiv 2504.03790): suffix Metropolis-Hastings for p(x) e^{r(x) / beta}, with proposals
from p itself.

Keep x_<n, draw the rest y_n, y_n+1, ... from p, and accept with probability min(1, e^A),

    A = (r(y) - r(x)) / beta + log c(n | y) - log c(n | x)

c the law of the cut: the probabilities of the model cancel.  They do so only if the proposal is the
reference.  The published code draws at temperature 0.8 and leaves them out all the same, so in
place of p its target has p_0.8, the law whose every next token is drawn at that temperature.
"""

from __future__ import annotations

import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ppl.potential import Potential
from ppl.rewards import reward
from ppl.scorers import LogScore
from ppl.target import Target

from ..base import Guarantee, Kernel
from ..registry import sampler
from ..strings.cuts import Cut, uniform_in_length
from . import suffix


def target(p: Target, score: LogScore, *, beta: float | int | Float[Array, ""]) -> Target:
    """p(x) e^{r(x) / beta}, a target like any other: SMC takes it too.

    Args:
        p: the reference.
        score: r, as the log-score of `ppl.reward`: a function of strings, `ppl.python(f)`,
            `ppl.log_odds(f)` or `ppl.judge(...)`.
        beta: small values trust the reward, large ones p; published for the log-odds of a quality
            score: 0.1.

    Raises:
        ValueError: unless beta > 0.
    """
    return p * tilt(score, beta)


def tilt(score: LogScore, beta: float | int | Float[Array, ""]) -> Potential:
    """e^{r(x) / beta}.  Arguments and errors as in `target`."""
    if not isinstance(beta, Tracer) and not (beta > 0 and np.isfinite(beta)):
        raise ValueError(
            f"expected a finite beta above 0, got {beta}; e^(r / beta) tilts the model, 0.1 to 1 is"
            " usual"
        )
    return reward(score) ** (1 / beta)


@sampler(Guarantee.EXACT, proof="tests/samplers/mcmc/test_quest.py")
def kernel(
    p: Target,
    score: LogScore,
    *,
    beta: float | int | Float[Array, ""],
    cut: Cut = uniform_in_length,
) -> Kernel:
    """QAlign: chains over strings that leave p(x) e^{r(x) / beta} / Z invariant; draws from p are a
    good start.

    Args:
        p: the reference; a power or a constraint of its own is kept.
        score, beta: as in `target`.
        cut: the law of the cut (`samplers.strings.cuts`); by default the published one, uniform
            over the string, which pays for itself in A.

    Returns:
        `Kernel`, with the state and the info of `suffix.kernel`.

    Raises:
        ValueError: as `target` and `suffix.kernel` do.
    """
    return suffix.kernel(target(p, score, beta=beta), temperature=1.0, cut=cut)
