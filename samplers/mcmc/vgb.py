"""VGB (arXiv 2510.03149): a random walk with backtracking on the tree of prefixes, guided by values
of prefixes.

With any positive values V, V(root) = 1, the walk goes from a node u

    to its parent           with weight 1
    to u a, a token         with weight p(a | u)^alpha V(u a) / V(u)
    to the end of u         with weight p(EOS | u)^alpha Phi(u) / V(u), p(EOS | u) = 1 at T

and from the end of u, a leaf, back to u.  Multiplied by p(u)^alpha V(u) these are weights of edges,
the same from both sides, so the walk is reversible, and a leaf is visited in proportion to its own
edge's weight, gamma: exactly, however wrong V is.  Good values save time.  They are the products of
the potential's look-ahead, so a twist with one makes them (`ppl.twists.twisted`); where a
look-ahead is a guess, the end pays the difference, which is what Phi(u) / V(u) says.  With exact
values leaves have 1 / 2H of the stationary law of a tree in which all have depth H, here T + 1.

The published walk stays where it is half of the time.  That would change neither which law leaves
have among themselves nor the limit of averages over time; it would only make everything twice as
dear, so this one never stays.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_counts
from ppl.draw import categorical
from ppl.lm import Cache
from ppl.potential import State as PotentialState
from ppl.pytrees import register_dataclass
from ppl.rows import at as entry
from ppl.rows import log_normalised, valid
from ppl.sequences import Sequences, empty
from ppl.target import Target

from ..base import Cost, Guarantee, Kernel, holding
from ..registry import sampler
from ..results import Chains, MoveInfo, changed_rows, moved
from ..strings import costs, growing
from ..strings.growing import Growing
from ..strings.ladders import check_alpha
from ..strings.proposals import as_proposal, bootstrap
from ..strings.regeneration import check_support

PROPOSAL = as_proposal(bootstrap)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """C walkers.

    sequences: where they are.  ended [C]: at the end of that string, a leaf.  owed [C, T]: of every
    token the log-factor of the potential less what the look-ahead said.  cache: the model's, of at
    least all tokens but the last. potential: its states after 0..T tokens, leaves [C, T + 1, ...]:
    where a walker goes back, they are there.
    """

    sequences: Sequences
    ended: Bool[Array, " C"]
    owed: Float[Array, "C T"]
    cache: Cache
    potential: PotentialState


@sampler(Guarantee.CONSISTENT, proof="tests/samplers/mcmc/test_vgb.py")
def run(key: PRNGKeyArray, target: Target, *, num_chains: int = 8, num_steps: int = 1000) -> Chains:
    """Walk from the root, in one jit; the law of the leaves visited tends to gamma / Z with the
    number of steps.

        vgb.run(key, ppl.twists.twisted(p * reward, twist))

    Args:
        key: typed key.
        target: gamma, whose potential has a look-ahead; a language model needs none.  V should be
            about what the rest of a string contributes, up to a constant: where gamma has p^4 or
            small factors and V leaves that out, ways on weigh next to nothing against the way back,
            and the walk hardly leaves the root.
        num_chains: C, independent walkers with keys of their own.
        num_steps: S; each is a pass of the model, and an evaluation of the potential's look-ahead
            and of its last factor at the node.  About one in 2 T ends a string, if the values are
            good.

    Returns:
        `Chains`: `draws` have where the walkers were after every step, as `sequences`, and
        `log_weights` [S, C], 0 at leaves and -inf elsewhere, so that leaves are equally weighted
        strings; `state` has the walkers.  `info` [S, 1, C] is that of single steps on the tree.

    Raises:
        ValueError: unless the counts are at least 1 and alpha > 0, or if the potential has no
            look-ahead.
    """
    check_counts(num_chains=num_chains, num_steps=num_steps)
    check_values(target)
    return _run(key, target, num_chains, num_steps)


@sampler(Guarantee.EXACT, proof="tests/samplers/mcmc/test_vgb.py")
def kernel(target: Target) -> Kernel:
    """Chains over strings that leave gamma / Z invariant and are reversible: the walk, watched when
    it is at a leaf.

    A step of the chain lasts until every walker is at a leaf again, 2 T steps on the tree if the
    values are exact.

    Args:
        target: as in `run`.

    Returns:
        `Kernel`: `init` takes `Sequences` of C strings to the leaves of a `State`; `step` returns
        `MoveInfo` [C] too, whose `tokens`, and `steps` in `details`, are steps on the tree.

    Raises:
        ValueError: as `run`; by `init`, if the strings are not the target's, or one has density
            zero.
    """
    check_values(target)
    return Kernel(Partial(_leaves, target), holding(_to_next_leaf, target))


def _leaves(target: Target, x: Sequences) -> State:
    """Walkers at the strings `x`, checked."""
    target.space.check(x)
    check_support(target.log_density(x.tokens, x.length))
    return at(target, x, jnp.ones(x.length.shape, bool))


def check_values(target: Target) -> None:
    """Raise ValueError unless alpha > 0 and the potential has a look-ahead (or there is none)."""
    check_alpha(target)
    known = jax.eval_shape(lambda: target.potential.lookahead(target.potential.init(1)))
    if target.tilted and known is None:
        raise ValueError(
            "expected a potential with a look-ahead, which gives the values of prefixes, got one"
            " without; make one with"
            " ppl.twists.twisted(target, twist)"
        )


# The walk.


def root(target: Target, num: int) -> State:
    """`num` walkers at the empty string."""
    depths = target.max_tokens + 1
    stack = jax.tree.map(
        lambda leaf: jnp.repeat(leaf[:, None], depths, axis=1), target.potential.init(num)
    )
    zeros = jnp.zeros((num, target.max_tokens), jnp.float32)
    strings = empty(num, target.max_tokens, target.lm.eos)
    cache = target.lm.init(target.prefix, num, target.max_tokens)
    return State(strings, jnp.zeros(num, bool), zeros, cache, stack)


@jax.jit
def at(target: Target, x: Sequences, ended: Bool[Array, " C"]) -> State:
    """Walkers at the strings `x`, which are prefixes where they are not `ended`."""

    def body(t: Array, state: State) -> State:
        here, _ = growing.forward(target, _at_nodes(target, state))
        return _descend(target, state, here, x.tokens[:, t], t < x.length)[0]

    state = jax.lax.fori_loop(0, x.length.max(), body, root(target, x.length.shape[0]))
    return dataclasses.replace(state, ended=ended)


def log_edges(
    target: Target, state: State, logits: Float[Array, "C V"]
) -> tuple[Array, Bool[Array, " C"]]:
    """The log-weights of all ways on from where the walkers are [C, V + 1], given the model's
    logits there.

    Columns are tokens, that of EOS is the end of the string, and the last one is the way back.
    Also returns where the potential or the model gave NaN or +inf [C].
    """
    eos, length = target.lm.eos, state.sequences.length
    here = _top(state)
    log_p = target.log_prob_factor(log_normalised(logits))
    ahead = target.lookahead(here)
    tokens = log_p if ahead is None else log_p + ahead.known
    full, may_end = length == target.max_tokens, _may_end(target, state, log_p)
    # The true factor and no look-ahead, which may guess it.
    final = target.potential.final_where(here, may_end) + state.owed.sum(1)
    end = jnp.where(may_end, final + jnp.where(full, 0.0, log_p[:, eos]), -jnp.inf)
    tokens = jnp.where((state.ended | full)[:, None], -jnp.inf, tokens).at[:, eos].set(end)
    back = jnp.where(state.ended | (length > 0), 0.0, -jnp.inf)
    weights = jnp.concatenate([tokens, back[:, None]], axis=1)
    weights, invalid = valid(weights)
    return weights, invalid if ahead is None else invalid | (ahead.invalid & ~state.ended)


def _may_end(target: Target, state: State, log_p: Float[Array, "C V"]) -> Bool[Array, " C"]:
    """Where the end of the string is a way on, so that its factor is asked for."""
    full = state.sequences.length == target.max_tokens
    return ~state.ended & (full | (log_p[:, target.lm.eos] > -jnp.inf))


def step(
    key: PRNGKeyArray, target: Target, state: State, moving: Bool[Array, " C"]
) -> tuple[State, Bool[Array, " C"], Cost]:
    """One step on the tree for the walkers `moving`; also returns where something was NaN or +inf
    [C], and what it took.
    """
    eos = target.lm.eos
    x, logits = growing.forward(target, _at_nodes(target, state))
    weights, invalid = log_edges(target, state, logits)
    spent = _cost(target, state, x, logits, moving)
    choice, log_q = categorical(jax.random.split(key, moving.shape[0]), weights)
    moving = moving & (log_q > -jnp.inf)  # a root without a way on
    back, end = moving & (choice == target.lm.vocab_size), moving & (choice == eos)
    down = moving & ~back & ~end
    new, after = _descend(target, state, x, choice, down)
    # From a leaf the way back leads to its string, from a string to the string without its last
    # token.
    shorter = back & ~state.ended
    length = new.sequences.length - shorter
    kept = ~shorter[:, None] | (jnp.arange(target.max_tokens) < length[:, None])
    strings = Sequences(jnp.where(kept, new.sequences.tokens, eos), length)
    ended = (state.ended & ~back) | end
    new = dataclasses.replace(
        new, sequences=strings, ended=ended, owed=jnp.where(kept, new.owed, 0.0)
    )
    judged = Cost(judge_tokens=after.judged.sum(dtype=jnp.int32))
    return new, moving & (x.invalid | invalid | after.invalid), spent | judged


def _top(state: State) -> PotentialState:
    """The potential's states where the walkers are."""
    rows = jnp.arange(state.ended.shape[0], dtype=jnp.int32)
    return jax.tree.map(lambda leaf: leaf[rows, state.sequences.length], state.potential)


def _at_nodes(target: Target, state: State) -> Growing:
    """The strings where the walkers are, to be read by the engine."""
    x = state.sequences
    # Their caches may hold more: a walker that went back has left its tokens there.
    cache = target.lm.truncate(state.cache, jnp.maximum(x.length - 1, 0))
    return growing.of(x, ~state.ended, cache, _top(state))


def _descend(
    target: Target, state: State, x: Growing, token: Int[Array, " C"], rows: Bool[Array, " C"]
) -> tuple[State, Growing]:
    """One token more in the rows `rows` of the strings `x`, which the model has read; also returns
    these strings.
    """
    num, row, length = rows.shape[0], jnp.arange(rows.shape[0], dtype=jnp.int32), x.sequences.length
    ahead = target.lookahead(x.potential)
    drawn = jnp.where(rows, token, target.lm.eos)
    guess = jnp.zeros(num, jnp.float32) if ahead is None else entry(ahead.known, drawn)
    after, log_factor = growing.take(target, PROPOSAL, x, drawn, rows, cut=False)
    # What a look-ahead forbids is never entered, except by a start there: it is owed everything.
    owed = jnp.where(jnp.isneginf(guess) | jnp.isneginf(log_factor), -jnp.inf, log_factor - guess)
    place = jnp.where(rows, length, target.max_tokens)  # out of bounds: dropped
    deeper = jnp.where(rows, length + 1, target.max_tokens + 1)
    stack = jax.tree.map(
        lambda all, new: all.at[row, deeper].set(new, mode="drop"), state.potential, after.potential
    )
    state = dataclasses.replace(
        state,
        sequences=after.sequences,
        owed=state.owed.at[row, place].set(owed, mode="drop"),
        cache=after.cache,
        potential=stack,
    )
    return state, after


# Runs.


@functools.partial(jax.jit, static_argnums=(2, 3))
def _run(key: Any, target: Target, num: int, num_steps: int) -> Chains:
    everyone = jnp.ones(num, bool)

    def body(carry: tuple[State, Cost], step_key: Array) -> tuple[tuple[State, Cost], tuple]:
        state, cost = carry
        after, invalid, spent = step(step_key, target, state, everyone)
        changed = changed_rows((state.sequences, state.ended), (after.sequences, after.ended))
        info = moved(everyone, changed=changed, tokens=everyone.astype(jnp.int32), invalid=invalid)
        kept = after.sequences, after.ended, dataclasses.replace(info, cost=None)
        return (after, cost + spent), kept

    start = root(target, num), costs.prompt(target, PROPOSAL)
    (state, cost), (strings, ended, info) = jax.lax.scan(
        body, start, jax.random.split(key, num_steps)
    )
    log_weights = jnp.where(ended, 0.0, -jnp.inf).astype(jnp.float32)
    return Chains(
        draws={"sequences": strings, "log_weights": log_weights},
        info=jax.tree.map(lambda leaf: leaf[:, None], info),
        state=state,
        cost=cost,
        steps=num_steps,
    )


@jax.jit
def _to_next_leaf(key: Any, target: Target, start: State) -> tuple[State, MoveInfo]:
    num = start.ended.shape[0]

    def body(carry: tuple) -> tuple:
        t, state, under_way, steps, invalid, cost = carry
        state, wrong, spent = step(jax.random.fold_in(key, t), target, state, under_way)
        going = under_way & ~state.ended
        return t + 1, state, going, steps + under_way, invalid | wrong, cost + spent

    carry = (
        jnp.int32(0),
        start,
        jnp.ones(num, bool),
        jnp.zeros(num, jnp.int32),
        jnp.zeros(num, bool),
        Cost(),
    )
    _, state, _, steps, invalid, cost = jax.lax.while_loop(lambda c: c[2].any(), body, carry)
    return state, moved(
        jnp.ones(num, bool),
        changed=changed_rows(start.sequences, state.sequences),
        tokens=steps,
        invalid=invalid,
        cost=cost,
        details={"steps": steps},
    )


def _cost(
    target: Target, state: State, x: Growing, logits: Float[Array, "C V"], moving: Bool[Array, " C"]
) -> Cost:
    """A step, which draws one of V + 1 ways on, but for what judges read on the way down."""
    steps = moving.sum(dtype=jnp.int32)
    asked = moving & _may_end(target, state, target.log_prob_factor(logits))
    ends = jnp.full(moving.shape, target.lm.eos, jnp.int32)
    judged = target.judged(_top(state), ends, asked, jnp.bool_(False))
    return dataclasses.replace(
        costs.one_pass(target, PROPOSAL, dataclasses.replace(x, active=x.active & moving)),
        # It is made for all walkers, also where none of them needs it.
        forwards=jnp.int32(1),
        depth=jnp.int32(1),
        tokens=steps,
        potential_calls=steps * target.tilted,
        judge_tokens=judged.sum(dtype=jnp.int32),
    )
