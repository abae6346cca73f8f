"""Chains over order and string: new tails along the order, and new orders of the same string.

For gamma(order, x) = U(order) p_order(x)^alpha Phi(string(x)),

    tail      keep the first r sites of the order and their tokens, r uniform; order the rest anew,
              uniformly, and draw its tokens from d^alpha / Z; accept with probability
              min(1, prod Z(new tail) Phi(new) / (prod Z(old tail) Phi(old)))
    reorder   a new uniform order of all sites, accepted with min(1, (p_new(x) / p_old(x))^alpha)

A tail by itself gets everywhere (r = 0); a new order lets short tails reach every site.  Both leave
gamma invariant whatever the conditionals are.  Masking a random set of sites and filling it again
does not, unless they come from one joint law: it leaves neither the mean over orders nor any other
law that has a name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.any_order import random_ranks
from ppl.canvas import CanvasTarget, check_canvas
from ppl.draw import categorical, uniforms
from ppl.pytrees import register_dataclass
from ppl.rows import at
from ppl.sequences import Sequences, from_tokens

from ..base import Cost, Guarantee, Kernel, holding
from ..kernels import accept
from ..registry import sampler
from ..results import MoveInfo, changed_rows
from .unmasking import powered


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """C chains: tokens, rank [C, L]; log d and log Z by rank, 0 beyond the last [C, L]; log Phi
    [C].
    """

    tokens: Int[Array, "C L"]
    rank: Int[Array, "C L"]
    log_d: Float[Array, "C L"]
    log_norm: Float[Array, "C L"]
    log_phi: Float[Array, " C"]
    eos: int = dataclasses.field(metadata={"static": True})

    @property
    def log_prob(self) -> Float[Array, " C"]:
        """log p_order(x)."""
        return self.log_d.sum(1)

    @property
    def sequences(self) -> Sequences:
        """The tokens before the first EOS."""
        return from_tokens(self.tokens, self.eos)


@sampler(Guarantee.EXACT, proof="tests/samplers/canvas/test_tails.py")
def kernel(target: CanvasTarget) -> Kernel:
    """Tails along the order of canvases, which leave gamma(order, x) invariant.

        start = unmasking.run(key, target, num_particles=4).samples
        chains.run(key, kernels.cycle(tails.kernel(target), tails.reorder(target)), start, ...)

    `init` takes canvases with `tokens` and `rank` [C, L], such as `unmasking.run` has as samples.
    """
    check_canvas(target)
    return Kernel(Partial(init, target), holding(_tail, target))


@sampler(Guarantee.EXACT, proof="tests/samplers/canvas/test_tails.py")
def reorder(target: CanvasTarget) -> Kernel:
    """New orders of the same canvases, which leave gamma(order, x) invariant; L passes and no new
    token.

    `init` as in `kernel`.
    """
    check_canvas(target)
    return Kernel(Partial(init, target), holding(_reorder, target))


def init(target: CanvasTarget, x: Any) -> State:
    """Chains at canvases with tokens and rank [C, L]."""
    tokens, rank = jnp.asarray(x.tokens, jnp.int32), jnp.asarray(x.rank, jnp.int32)
    target.check(tokens, rank)
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    log_phi = target.log_potential(tokens).astype(jnp.float32)
    state = State(tokens, rank, zeros, zeros, log_phi, target.lm.eos)
    return _along(None, target, state, jnp.zeros(tokens.shape[0], jnp.int32))[0]


def _along(
    keys: Any, target: CanvasTarget, x: State, cut: Int[Array, " C"]
) -> tuple[State, Int[Array, ""]]:
    """The states with log d and log Z of all sites of rank `cut` [C] and beyond, whose tokens are
    drawn anew if there are keys [L, C]; and the passes.
    """
    count = target.open.sum(dtype=jnp.int32)

    def reveal(k: Array, x: State) -> State:
        active = k >= cut
        here = (x.rank == k).argmax(1).astype(jnp.int32)
        masked = target.open & (x.rank >= k)
        laws, log_norm = powered(target, log_d := target.denoise(x.tokens, masked, here[:, None]))
        token = at(x.tokens, here)
        if keys is not None:
            token = jnp.where(active, categorical(keys[k], laws[:, 0])[0], token)
        found = at(log_d[:, 0], token)
        rows = jnp.arange(token.shape[0])
        return dataclasses.replace(
            x,
            tokens=x.tokens.at[rows, here].set(token),
            log_d=x.log_d.at[:, k].set(jnp.where(active, found, x.log_d[:, k])),
            log_norm=x.log_norm.at[:, k].set(jnp.where(active, log_norm[:, 0], x.log_norm[:, k])),
        )

    first = cut.min().astype(jnp.int32)
    return jax.lax.fori_loop(first, count, reveal, x), count - first


def log_ratio_of_tails(old: State, new: State, cut: Int[Array, " C"]) -> Float[Array, " C"]:
    """log of the Hastings ratio of a new tail: what d^alpha / Z does not cancel."""
    tail = jnp.arange(old.rank.shape[1]) >= cut[:, None]
    log_norm = jnp.where(tail, new.log_norm - old.log_norm, 0.0).sum(1)
    # From density zero everything is accepted; to it, nothing.
    gained = jnp.where(jnp.isneginf(old.log_phi), jnp.inf, new.log_phi - old.log_phi)
    return jnp.where(jnp.isneginf(new.log_phi), -jnp.inf, log_norm + gained)


def log_ratio_of_orders(target: CanvasTarget, old: State, new: State) -> Float[Array, " C"]:
    """alpha (log p_new - log p_old)."""
    alpha = 1.0 if target.alpha is None else target.alpha
    impossible = jnp.isneginf(new.log_prob)
    return jnp.where(impossible, -jnp.inf, alpha * (new.log_prob - old.log_prob))


@jax.jit
def _tail(key: PRNGKeyArray, target: CanvasTarget, x: State) -> tuple[State, MoveInfo]:
    cut_key, order_key, token_key, accept_key = jax.random.split(key, 4)
    num, length = x.tokens.shape
    count = target.open.sum(dtype=jnp.int32)
    u = uniforms(jax.random.split(cut_key, num))
    cut = jnp.minimum((u * count).astype(jnp.int32), count - 1)
    loose = target.open & (x.rank >= cut[:, None])
    ranks = random_ranks(jax.random.split(order_key, num), loose)
    new = dataclasses.replace(x, rank=jnp.where(loose, ranks + cut[:, None], x.rank))
    step_keys = jax.random.split(token_key, length)
    keys = jax.vmap(lambda key: jax.random.split(key, num))(step_keys)
    new, passes = _along(keys, target, new, cut)
    new = dataclasses.replace(new, log_phi=target.log_potential(new.tokens).astype(jnp.float32))
    tokens = (count - cut).astype(jnp.int32)
    return _taken(accept_key, target, x, new, log_ratio_of_tails(x, new, cut), (tokens, passes))


@jax.jit
def _reorder(key: PRNGKeyArray, target: CanvasTarget, x: State) -> tuple[State, MoveInfo]:
    order_key, accept_key = jax.random.split(key)
    num = x.tokens.shape[0]
    ranks = random_ranks(
        jax.random.split(order_key, num), jnp.broadcast_to(target.open, x.rank.shape)
    )
    nothing = jnp.zeros(num, jnp.int32)
    new, passes = _along(None, target, dataclasses.replace(x, rank=ranks), nothing)
    ratio = log_ratio_of_orders(target, x, new)
    return _taken(accept_key, target, x, new, ratio, (nothing, passes))


def _taken(
    key: PRNGKeyArray,
    target: CanvasTarget,
    old: State,
    new: State,
    log_ratio: Float[Array, " C"],
    spent: tuple[Int[Array, " C"], Int[Array, ""]],
) -> tuple[State, MoveInfo]:
    """New states where the ratio allows, and what was done."""
    tokens, passes = spent
    after, info = accept(key, log_ratio, old, new)
    calls = jnp.int32(old.tokens.shape[0] if target.tilted else 0)
    cost = Cost(
        tokens=tokens.sum(dtype=jnp.int32), forwards=passes, depth=passes, potential_calls=calls
    )
    places = [(x.tokens, x.rank) for x in (old, after)]
    return after, dataclasses.replace(
        info,
        changed=changed_rows(*places),
        cost=cost,
        tokens=tokens,
        outside_support=jnp.isneginf(after.log_phi),
    )
