"""How moves over strings cut, draw and weigh: their options, checked and bound to a target."""

from __future__ import annotations

import dataclasses
from typing import TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppl.checks import check_function
from ppl.pytrees import as_pytree, register_dataclass
from ppl.target import Target

from ..strings import proposals
from ..strings.cuts import Cut, uniform
from ..strings.ladders import check_alpha
from ..strings.proposals import Law, Powered, Proposal, as_proposal


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Method:
    """The options of `suffix.kernel`, checked and bound.

    log_phi_max bounds log Phi if the other increments are known to be at most 0; else it is +inf.
    """

    proposal: Proposal
    cut: Cut
    log_phi_max: Float[Array, ""]
    early_rejection: bool = dataclasses.field(metadata={"static": True})


class DrawOptions(TypedDict, total=False):
    """How the rest of a string is cut off and drawn: see `method`, which says what each is."""

    temperature: float | Float[Array, ""] | None
    proposal: Proposal | Law | None
    cut: Cut


class Options(DrawOptions, total=False):
    """How chains may differ: see `method`, which says what each is.  All leave the target
    invariant.
    """

    log_phi_max: float | Float[Array, ""] | None
    early_rejection: bool


def method(
    target: Target,
    *,
    temperature: float | Float[Array, ""] | None = None,
    proposal: Proposal | Law | None = None,
    cut: Cut = uniform,
    log_phi_max: float | Float[Array, ""] | None = None,
    early_rejection: bool = True,
) -> Method:
    """Check and bind the options of `suffix.kernel`.

    Args:
        temperature: q proportional to p^(1 / temperature); by default q is proportional to p^alpha
            and to the factors that the potential knows in advance (`proposals.Powered`).
        proposal: any other proposal that has a law (`samplers.strings.proposals`;
            `LanguageModel` for another model).
        cut: the law of the cut (`samplers.strings.cuts`); by default uniform on 0..T - 1.
        log_phi_max: an upper bound of log Phi, 0 for constraints; early rejection needs it if there
            is a potential.
        early_rejection: draw log u first, and stop a string as soon as no continuation could be
            accepted.  It changes what a run costs and nothing else.  It needs 1 <= 1 / temperature
            <= alpha; otherwise, and with proposals that look ahead or are others, only strings of
            density zero are stopped.

    Raises:
        ValueError: unless alpha > 0 and temperature > 0, if both a temperature and a proposal are
            given, or the proposal can only draw.
    """
    check_alpha(target)
    check_function("cut", cut, "(cut, length, horizon)", "samplers.strings.cuts.uniform")
    alpha = target.power
    if temperature is not None and proposal is not None:
        raise ValueError("expected a temperature or a proposal, got both; leave one out")
    if proposal is not None:
        how, bounded = as_proposal(proposal), jnp.bool_(False)
    elif temperature is not None:
        how = as_proposal(proposals.tempered(temperature))
        bounded = (jnp.asarray(temperature) <= 1) & (jnp.asarray(temperature) * alpha >= 1)
    else:
        how = Powered(lookahead=True)
    if isinstance(how, Powered):
        bounded = alpha >= 1
    if not how.has_law:
        raise ValueError(
            "expected a proposal with a law, to score the present string, got"
            f" {type(how).__name__}, which can only"
            " draw; use samplers.strings.proposals.locally_optimal"
        )
    known = 0.0 if not target.tilted else jnp.inf
    log_phi_max = jnp.where(bounded, known if log_phi_max is None else log_phi_max, jnp.inf)
    return Method(how, as_pytree(cut), log_phi_max, early_rejection)
