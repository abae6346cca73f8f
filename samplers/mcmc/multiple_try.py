"""Multiple-try Metropolis from a cut: of M ways to go on, or to replace a block of tokens, one is
drawn by weight.

With a cut r and the end e of what is drawn anew (the horizon, or e = r + b for blocks of b tokens),
M strings y_j keep x_<r, draw positions r..e-1 from the proposal q, and keep x_e: again.  With

    w(y) = prod_{t >= r} p(y_t | y_<t)^alpha phi_t(y) / prod_{r <= t < e} q(y_t | y_<t)  *  c(r | y)

c the law of the cut, j is drawn in proportion to w(y_j), and y_j accepted with probability

    min(1, sum_i w(y_i) / (sum_i w(y_i) - w(y_j) + w(x))).

The tries do not depend on x beyond what is kept, so no reference tries are needed (independent
multiple-try Metropolis: Liu, Liang and Wong 2000), and the chain leaves gamma / Z invariant at any
M and b.

Strings are seen as padded with EOS up to the horizon: what is kept of a string that ends within the
block is EOS, so a block that does not end is followed by EOS; and a block that ends while tokens
are to be kept has weight zero.

M = 1 without blocks is suffix Metropolis-Hastings, M = 1 with b = 1 replaces single tokens, and
with large M the block is drawn from its law given all the rest: blocked Gibbs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.checks import check_count
from ppl.draw import categorical, uniforms
from ppl.pytrees import register_dataclass
from ppl.rows import at, take_rows, where_rows
from ppl.target import Target

from ..base import Cost, Guarantee, Kernel, holding
from ..registry import sampler
from ..results import MoveInfo
from ..strings.cuts import Cut
from ..strings.growing import Follow, Growing
from ..strings.proposals import Proposal
from ..strings.regeneration import State, drawn, each_times, init, log_density, rows_of
from . import from_cuts, suffix
from .options import DrawOptions


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Method:
    """The options of `kernel`, checked and bound."""

    proposal: Proposal
    cut: Cut
    num_tries: int = dataclasses.field(metadata={"static": True})
    block: int | None = dataclasses.field(metadata={"static": True})


@sampler(Guarantee.EXACT, proof="tests/samplers/mcmc/test_multiple_try.py")
def kernel(
    target: Target,
    *,
    num_tries: int = 4,
    block: int | None = None,
    **options: Unpack[DrawOptions],
) -> Kernel:
    """Multiple-try Metropolis over strings: chains that leave gamma / Z invariant.

    Every chain has its own cut, length and keys; its M tries are rows of one batch, so that C
    chains step the model for C * M rows, and their caches take as much memory.  Chains may have an
    alpha each (`target.alpha` [C]); potentials and proposals must be the same for all chains.

    Kernels with the same target and proposal have the same state (that of `suffix.kernel`) and can
    be cycled.

    Args:
        target: gamma.
        num_tries: M.
        block: b, how many tokens from the cut on are replaced; None is all.
        options: `temperature`, `proposal` and `cut` as in `suffix.method`.

    Returns:
        `Kernel`: `init` scores `Sequences` of C strings and makes a `regeneration.State`, `step` is
        one move of every chain and returns `MoveInfo` [C], whose `details` have `cut`, r in 0..T-1.
        `tokens` are those of all tries; what is kept costs forward passes, but is not drawn.

    Raises:
        ValueError: unless `num_tries` and `block` are at least 1; and as `suffix.kernel` does.
    """
    how = method(target, num_tries=num_tries, block=block, **options)
    return Kernel(Partial(init, target, how.proposal), holding(_step, target, how))


@sampler(Guarantee.EXACT, proof="tests/samplers/mcmc/test_multiple_try.py")
def token_replacement(target: Target, **options: Unpack[DrawOptions]) -> Kernel:
    """Metropolis-Hastings that replaces single tokens: `kernel` with M = 1 and b = 1."""
    return kernel(target, num_tries=1, block=1, **options)


@sampler(Guarantee.EXACT, proof="tests/samplers/mcmc/test_multiple_try.py")
def blocked_gibbs(
    target: Target, *, block: int = 8, num_tries: int = 8, **options: Unpack[DrawOptions]
) -> Kernel:
    """Blocks drawn anew given all the rest: `kernel` with a block.

    Invariant at any `num_tries`; as they grow, the move becomes that of the Gibbs sampler over
    blocks of tokens.
    """
    return kernel(target, num_tries=num_tries, block=block, **options)


def method(
    target: Target,
    *,
    num_tries: int = 4,
    block: int | None = None,
    **options: Unpack[DrawOptions],
) -> Method:
    """Check and bind the options of `kernel`."""
    check_count("num_tries", num_tries)
    if block is not None:
        check_count("block", block)
    how = suffix.method(target, **options)
    return Method(how.proposal, how.cut, num_tries, block)


# What moves are made of.


def end_of(target: Target, how: Method, cut: Int[Array, " C"]) -> Int[Array, " C"]:
    """e, where what is drawn anew ends."""
    return jnp.minimum(
        cut + (target.max_tokens if how.block is None else how.block), target.max_tokens
    )


def log_weight(
    target: Target, how: Method, x: State, cut: Int[Array, " C"], end: Int[Array, " C"]
) -> Float[Array, " C"]:
    """log w of every string; +inf for one in the support that the proposal cannot draw, and so
    cannot be left.
    """
    positions = jnp.arange(x.log_p.shape[1], dtype=jnp.int32)
    rest, anew = positions >= cut[:, None], positions < end[:, None]
    density = target.log_prob_factor(x.log_p) + x.log_phi
    gain = jnp.where(rest, density, 0.0).sum(1) - jnp.where(rest & anew, x.log_q, 0.0).sum(1)
    gain += how.cut(cut, x.sequences.length, jnp.full_like(cut, target.max_tokens))
    return jnp.where(jnp.isneginf(density).any(1), -jnp.inf, gain)


def keeps_rest(y: State, length: Int[Array, " C"], end: Int[Array, " C"]) -> Bool[Array, " C"]:
    """Whether `y` did not end within the block while the present string, of `length` tokens, has
    some to be kept.
    """
    return (y.sequences.length >= end) | (length <= end)


def log_ratio(
    log_weights: Float[Array, "C M"], log_present: Float[Array, " C"]
) -> Float[Array, "C M"]:
    """log of sum_i w_i / (sum_i w_i - w_j + w(x)) for every j; -inf if all w_i are zero."""
    num = log_weights.shape[1]
    # The sum without w_j is taken anew: a difference would lose all digits where w_j dominates.
    others = jnp.where(jnp.eye(num, dtype=bool), log_present[:, None, None], log_weights[:, None])
    ratio = jax.nn.logsumexp(log_weights, axis=1, keepdims=True) - jax.nn.logsumexp(others, axis=2)
    return jnp.where(jnp.isneginf(log_weights).all(1, keepdims=True), -jnp.inf, ratio)


@jax.jit
def _step(key: Any, target: Target, how: Method, x: State) -> tuple[State, MoveInfo]:
    cut, (draw_keys, choice_keys, accept_keys) = from_cuts.begin(key, how.cut, x)
    proposed = cut <= x.sequences.length
    tries, cost = _tries(draw_keys, target, how, x, cut, proposed)
    chosen, log_ratios = _chosen(choice_keys, target, how, x, drawn(tries), cut)
    ratio = jnp.where(proposed, log_ratios, 0.0)
    accepted = proposed & (jnp.log(uniforms(accept_keys)) < ratio)
    new = where_rows(accepted, rows_of(target, drawn(tries), chosen), x)
    known = {"proposed": proposed, "log_ratio": ratio, "cost": cost, "details": {"cut": cut}}
    return new, from_cuts.report(target, x, new, accepted, tries, **known)


def _chosen(
    keys: Key[Array, " C"],
    target: Target,
    how: Method,
    x: State,
    tries: State,
    cut: Int[Array, " C"],
) -> tuple[Int[Array, " C"], Float[Array, " C"]]:
    """The try of every chain that is taken or left, a row of all of them, and log of its ratio."""
    num, end = cut.shape[0], end_of(target, how, cut)
    log_weights = log_weight(each_times(target, how.num_tries), how, tries, *_rows(how, cut, end))
    kept = keeps_rest(tries, *_rows(how, x.sequences.length, end))
    log_weights = jnp.where(kept, log_weights, -jnp.inf).reshape(num, -1)
    chosen, _ = categorical(keys, log_weights)
    ratios = log_ratio(log_weights, log_weight(target, how, x, cut, end))
    rows = chosen + how.num_tries * jnp.arange(num, dtype=jnp.int32)
    return rows, at(ratios, chosen).astype(jnp.float32)


def _rows(how: Method, *leaves: Array) -> tuple[Array, ...]:
    """[C] -> [C * M]."""
    return tuple(jnp.repeat(leaf, how.num_tries, axis=0) for leaf in leaves)


def _tries(
    keys: Any,
    target: Target,
    how: Method,
    x: State,
    cut: Array,
    proposed: Bool[Array, " C"],
) -> tuple[Growing, Cost]:
    """M tries of every chain [C * M], and what they cost; those of density zero are stopped."""
    chains, end = _rows(how, jnp.arange(cut.shape[0], dtype=jnp.int32), end_of(target, how, cut))
    tries, own, cost = from_cuts.rows(keys, target, how.proposal, x, cut, proposed, how.num_tries)
    rows = each_times(target, how.num_tries)
    given = None if how.block is None else take_rows(x.sequences, chains)

    def one_more(carry: tuple[Growing, Cost]) -> tuple[Growing, Cost]:
        g, cost = carry
        follows = g.sequences.length >= end
        follow = None if given is None else Follow(follows, given)
        new, spent = from_cuts.longer(own, rows, how.proposal, g, follow)
        new = dataclasses.replace(
            new,
            active=new.active & ~jnp.isneginf(log_density(rows, drawn(new))),
            # What is kept is not drawn.
            missing=jnp.where(follows, g.missing, new.missing),
        )
        return new, cost + spent

    return jax.lax.while_loop(lambda carry: carry[0].active.any(), one_more, (tries, cost))
