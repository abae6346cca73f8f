"""Pref-MH (arXiv 2609.00905): Metropolis-Hastings with noisy pairwise judges, exact for any number
of votes.

The target is gamma(x) e^{s_1(x) + ... + s_J(x)} with scores nobody knows.  What is known are votes:
judge j, asked about x and y, prefers y with probability sigmoid(s_j(y) - s_j(x)) (Bradley and
Terry), independently each time.  With K_j votes for y out of N_j,

    accept y with probability min(1, r0 prod_j K_j / (N_j - K_j + 1))

r0 the Metropolis-Hastings ratio for gamma.  Averaged over the votes this is reversible at any N, as
K binom(N, K) = (N - K + 1) binom(N, K - 1) and swapping x with y swaps votes for with votes
against.  The plug-in K / (N - K), an estimate of e^{s(y) - s(x)}, is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.draw import uniforms
from ppl.rows import where_rows
from ppl.target import Target

from ..base import Cost, Guarantee, Kernel, holding
from ..registry import sampler
from ..results import MoveInfo
from ..strings import costs
from ..strings.cuts import Cut, uniform_in_length
from ..strings.growing import Growing, complete
from ..strings.proposals import Law, Proposal
from ..strings.regeneration import State, drawn, init, keys_at, start, truncated
from . import from_cuts, suffix
from .judges import Judge
from .options import Method


@sampler(Guarantee.EXACT, proof="tests/samplers/mcmc/test_pref_mh.py")
def kernel(
    target: Target,
    judges: Judge | Sequence[Judge],
    *,
    temperature: float | int | Float[Array, ""] | None = None,
    proposal: Proposal | Law | None = None,
    cut: Cut = uniform_in_length,
) -> Kernel:
    """Pref-MH over suffixes: chains over strings that leave gamma(x) e^{sum_j s_j(x)} / Z invariant
    at any N_j >= 1.

    Args:
        target: gamma, p(x)^alpha Phi(x).  With p itself and proposals from p, the default, r0 is
            that of the cut alone.
        judges: one or several (`samplers.mcmc.judges`), each with its number of votes N_j; few
            votes make few moves, never a wrong law.
        temperature, proposal: of the suffix drawn, as in `suffix.method`.
        cut: the law of the cut; by default uniform over the string, so that no votes are asked for
            in vain.

    Returns:
        `Kernel` with the state of `suffix.kernel`; `step` returns `MoveInfo` [C], whose `details`
        have `cut` and `votes` [C, J] for the string drawn, which count for nothing where nothing
        was proposed.  `log_ratio` is log r0, the votes left out; a number of votes outside of 0..N
        is `invalid`, and the string not taken.  `cost` has what the judges read, if they say so.

    Raises:
        ValueError: if there is no judge, or as in `suffix.method` and, by `init`, `suffix.kernel`.
    """
    how = suffix.method(target, temperature=temperature, proposal=proposal, cut=cut)
    panel = (judges,) if isinstance(judges, Judge) else tuple(judges)
    if not panel:
        raise ValueError(
            "expected a judge, got none; make one with judges.pairwise, or use suffix.kernel"
        )
    return Kernel(Partial(init, target, how.proposal), holding(_step, target, how, panel))


def log_vote_factor(votes: Int[Array, "*C"], num_votes: int) -> Float[Array, "*C"]:
    """log K / (N - K + 1), with which acceptance is multiplied; -inf for no votes, or an impossible
    number of them.
    """
    possible = (votes > 0) & (votes <= num_votes)
    kept = jnp.where(possible, votes, 1)
    return jnp.where(possible, jnp.log(kept) - jnp.log(num_votes - kept + 1), -jnp.inf)


@jax.jit
def _step(
    key: Any, target: Target, how: Method, judges: tuple[Judge, ...], x: State
) -> tuple[State, MoveInfo]:
    cut, (draw_keys, vote_keys, accept_keys) = from_cuts.begin(key, how.cut, x)
    proposed = cut <= x.sequences.length
    growth, cost = _draw(draw_keys, target, how, truncated(target, x, cut), proposed)
    y = drawn(growth)

    votes, factor, impossible = _asked(vote_keys, judges, x, y)
    read = sum(judge.tokens_read(x.sequences, y.sequences) for judge in judges)
    judged = Cost(judge_tokens=jnp.where(proposed, read, 0).sum(dtype=jnp.int32))
    invalid = growth.invalid | (proposed & impossible)
    longest = jnp.full_like(cut, target.max_tokens)
    ratio = suffix.log_ratio(target, how.cut, x, y, cut, longest).astype(jnp.float32)
    ratio = jnp.where(proposed, ratio, 0.0)
    # A string outside of the support is taken or left whatever the judges say.
    total = jnp.where(jnp.isinf(ratio), ratio, ratio + factor)
    accepted = proposed & ~invalid & (jnp.log(uniforms(accept_keys)) < total)
    new = where_rows(accepted, y, x)
    return new, from_cuts.report(
        target,
        x,
        new,
        accepted,
        growth,
        proposed=proposed,
        log_ratio=ratio,
        invalid=invalid,
        cost=cost + judged,
        details={"cut": cut, "votes": votes},
    )


def _asked(
    keys: Key[Array, " C"], judges: tuple[Judge, ...], x: State, y: State
) -> tuple[Int[Array, "C J"], Float[Array, " C"], Bool[Array, " C"]]:
    """The votes of all judges, log of what they multiply acceptance with, and where some judge gave
    an impossible number of them.
    """
    votes, factor = [], jnp.zeros(keys.shape, jnp.float32)
    for j, judge in enumerate(judges):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, j)
        votes.append(judge.votes(own, x.sequences, y.sequences).astype(jnp.int32))
        factor += log_vote_factor(votes[-1], judge.num_votes).astype(jnp.float32)
    cast, most = jnp.stack(votes, axis=1), jnp.asarray([judge.num_votes for judge in judges])
    return cast, factor, ((cast < 0) | (cast > most)).any(1)


def _draw(
    keys: Key[Array, " C"], target: Target, how: Method, y: State, active: Bool[Array, " C"]
) -> tuple[Growing, Cost]:
    """The strings `y` continued to their ends in the rows `active`."""
    started = start(target, how.proposal, y, active)
    growth = complete(keys_at(keys), target, how.proposal, started)
    cost = costs.of_round(target, how.proposal, growth)
    return growth, cost + costs.replay(target, how.proposal, started)
