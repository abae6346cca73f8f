"""Trajectories of generic environments: drawn, scored for the balance objectives, and their exact
terminal law.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl import draw
from ppl.pytrees import register_dataclass
from ppl.showing import shown

from ..objectives.balance import Scalar, Trajectories
from .environments import Environment


@shown
class Outputs(NamedTuple):
    """What a policy says of states: logits [*N, A+1] of the moves and of stopping, log_flow [*N] if
    it has state flows, undo_logits [*N, B] if the backward policy is learned (otherwise it is
    uniform over the legal undos)."""

    logits: Float[Array, "*N K"]
    log_flow: Float[Array, "*N"] | None = None
    undo_logits: Float[Array, "*N B"] | None = None


SMALL = 256
"""A rectangle of so few states is not worth several programs."""

Policy = Callable[[Int[Array, "*N D"]], Outputs]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Paths:
    """N trajectories: states [N, L+1, D], moves [N, L], length [N]; from `length` on the last state
    stands still.
    """

    states: Int[Array, "N M D"]
    moves: Int[Array, "N L"]
    length: Int[Array, " N"]


def rollout(
    key: PRNGKeyArray, env: Environment, policy: Policy, num: int, epsilon: Scalar = 0.0
) -> Paths:
    """`num` trajectories from the first state until they stop.

    Each action of each trajectory is drawn from the policy with probability 1 - epsilon, otherwise
    uniformly from the legal ones.  The law they were drawn from is not returned: losses score
    trajectories under the policy itself (`evaluate`).
    """
    keys = jax.vmap(lambda step_key: jax.random.split(step_key, num))(
        jax.random.split(key, env.max_moves)
    )

    def act(state: Array, legal: Array, keys: Array) -> Array:
        log_pf = jax.nn.log_softmax(jnp.where(legal, policy(state).logits, -jnp.inf))
        uniform = jnp.where(
            legal, -jnp.log(legal.sum(-1, keepdims=True, dtype=jnp.float32)), -jnp.inf
        )
        mixture = jnp.logaddexp(
            log_pf + jnp.log1p(-jnp.asarray(epsilon)), uniform + jnp.log(jnp.asarray(epsilon))
        )
        return draw.categorical(keys, mixture)[0]

    def body(carry: tuple) -> tuple:
        step, state, legal, going, length, states, moves = carry
        move = act(state, legal, keys[step])
        moved = going & (move < env.num_moves)
        state = jnp.where(
            moved[:, None], env.step(state, jnp.minimum(move, env.num_moves - 1)), state
        )
        states, moves = (
            states.at[step + 1].set(state),
            moves.at[step].set(jnp.where(moved, move, 0)),
        )
        legal = env.legal(state)
        # Where stopping is all that is left, the policy need not be asked.
        return step + 1, state, legal, moved & legal[:, :-1].any(-1), length + moved, states, moves

    start = jnp.broadcast_to(env.initial, (num, env.initial.shape[0]))
    states = jnp.broadcast_to(start, (env.max_moves + 1, *start.shape))
    moves = jnp.zeros((env.max_moves, num), jnp.int32)
    carry = (
        jnp.int32(0),
        start,
        env.legal(start),
        jnp.ones(num, bool),
        jnp.zeros(num, jnp.int32),
        states,
        moves,
    )
    # The loop ends with the last trajectory; what it did not write repeats the last state.
    taken, state, _, _, length, states, moves = jax.lax.while_loop(
        lambda c: c[3].any() & (c[0] < env.max_moves), body, carry
    )
    written = jnp.arange(env.max_moves + 1) <= taken
    states = jnp.where(written[:, None, None], states, state)
    return Paths(states.swapaxes(0, 1), moves.T, length)


def backward_rollout(
    key: PRNGKeyArray, env: Environment, states: Int[Array, "N D"], policy: Policy | None = None
) -> Paths:
    """Trajectories that stop in given states, drawn from the backward policy (uniform without a
    `policy`).
    """
    num = states.shape[0]
    rows = jnp.arange(num, dtype=jnp.int32)

    def body(carry: tuple, step_key: Array) -> tuple[tuple, tuple]:
        state, length = carry
        legal = env.legal_undos(state)
        going = legal.any(-1)
        learned = None if policy is None else policy(state).undo_logits
        logits = jnp.where(legal, 0.0 if learned is None else learned, -jnp.inf)
        undo, _ = draw.categorical(jax.random.split(step_key, num), logits)
        parent, move = env.undo(state, undo)
        state = jnp.where(going[:, None], parent, state)
        return (state, length + going), (state, jnp.where(going, move, 0))

    carry = (states, jnp.zeros(num, jnp.int32))
    (_, length), (parents, moves) = jax.lax.scan(body, carry, jax.random.split(key, env.max_moves))
    # Step k of the way back is step length - 1 - k of the way there.
    back = jnp.concatenate([states[None], parents])
    at = jnp.maximum(length[:, None] - jnp.arange(env.max_moves + 1, dtype=jnp.int32), 0)
    moves = jnp.concatenate([jnp.zeros_like(moves[:1]), moves])
    forward = jnp.where(
        jnp.arange(env.max_moves) < length[:, None],
        moves[at, rows[:, None]][:, :-1],
        0,
    )
    return Paths(back[at, rows[:, None]], forward, length)


def evaluate(
    env: Environment,
    policy: Policy,
    paths: Paths,
    *,
    temperature: Scalar = 1.0,
    weight: Float[Array, " N"] | None = None,
) -> tuple[Trajectories, Float[Array, "N M"] | None]:
    """The paths scored under the current policy, for `balance`, and its log flows [N, L+1], if it
    has any.

    One call of the policy on all states, differentiable, at a cost in proportion to the states that
    there are.  The reward becomes R^(1 / temperature) here and only here.
    """
    states, next_states = paths.states[:, :-1], paths.states[:, 1:]
    if env.fixed_length:
        out = _on_full(policy, paths)
    else:
        out = (
            policy(paths.states)
            if paths.states[..., 0].size <= SMALL
            else _on_visited(policy, paths)
        )
    log_pf = jax.nn.log_softmax(jnp.where(env.legal(paths.states), out.logits, -jnp.inf))
    legal = env.legal_undos(next_states)
    if out.undo_logits is None:
        log_pb = -jnp.log(jnp.maximum(legal.sum(-1), 1).astype(log_pf.dtype))
    else:
        made = legal.any(-1, keepdims=True)  # the first state, where nothing was done, has no undo
        undo_law = jax.nn.log_softmax(jnp.where(legal | ~made, out.undo_logits[:, 1:], -jnp.inf))
        log_pb = _take(undo_law, env.undo_of(states, paths.moves))
    trajectories = Trajectories(
        log_pf=_take(log_pf[:, :-1], paths.moves),
        log_pb=log_pb,
        log_stop=log_pf[..., -1],
        log_reward=env.log_reward(paths.states) / temperature,
        length=paths.length,
        weight=jnp.ones(paths.length.shape[0], log_pf.dtype) if weight is None else weight,
    )
    return trajectories, out.log_flow


def _on_full(policy: Policy, paths: Paths) -> Outputs:
    """The policy's outputs on all states [N, L+1, ...] of trajectories that make L moves, after
    which they must stop.

    So the last logits do not matter, and unless the policy says more than logits it is not asked
    for them.
    """
    kinds = jax.eval_shape(policy, paths.states)
    if kinds.log_flow is not None or kinds.undo_logits is not None:
        return policy(paths.states)
    return Outputs(jnp.pad(policy(paths.states[:, :-1]).logits, ((0, 0), (0, 1), (0, 0))))


def _on_visited(policy: Policy, paths: Paths) -> Outputs:
    """The policy's outputs on all states [N, L+1, ...], which beyond the ends repeat the last
    one's.

    Most of a rectangle of trajectories is such repetition when they end early.  The states that
    differ come first, and the smallest part of the whole that holds them all, from an eighth on,
    goes through the policy.
    """
    num, steps, dim = paths.states.shape
    total = num * steps
    sizes = [-(-total // parts) for parts in (8, 4, 2, 1)]
    visited = (jnp.arange(steps) <= paths.length[:, None]).reshape(total)
    place = (
        jnp.cumsum(visited, dtype=jnp.int32) - 1
    )  # where a state stands among the visited: for a repetition, the last one
    sources = (
        jnp.zeros(total, jnp.int32)
        .at[jnp.where(visited, place, total)]
        .set(jnp.arange(total, dtype=jnp.int32), mode="drop")
    )
    flat = paths.states.reshape(total, dim)

    def on_first(size: int) -> Callable[[], Outputs]:
        def outputs() -> Outputs:
            return jax.tree.map(lambda leaf: leaf[place], policy(flat[sources[:size]]))

        # Without it, a gradient would have each size write out zeros in place of what the others
        # keep.
        return jax.checkpoint(outputs)

    which = jnp.searchsorted(jnp.asarray(sizes), visited.sum())
    out = jax.lax.switch(which, [on_first(size) for size in sizes])
    return jax.tree.map(lambda leaf: leaf.reshape(num, steps, *leaf.shape[1:]), out)


def terminal_law(env: Environment, policy: Policy) -> Float[Array, " S"]:
    """The exact probability of stopping in each state [S], by pushing the mass of the first state
    through the graph.
    """
    states = env.states()
    legal = env.legal(states)
    prob = jax.nn.softmax(jnp.where(legal, policy(states).logits, -jnp.inf))
    moves = jnp.broadcast_to(
        jnp.arange(env.num_moves, dtype=jnp.int32), (states.shape[0], env.num_moves)
    )
    wide = jnp.broadcast_to(states[:, None], (*moves.shape, states.shape[1]))
    child = jnp.where(legal[:, :-1], env.index(env.step(wide, moves)), 0)

    def push(carry: tuple, _: None) -> tuple[tuple, None]:
        mass, stopped = carry
        moved = jnp.zeros_like(mass).at[child].add(mass[:, None] * prob[:, :-1])
        return (moved, stopped + mass * prob[:, -1]), None

    mass = jnp.zeros(states.shape[0], prob.dtype).at[env.index(env.initial)].set(1.0)
    (_, stopped), _ = jax.lax.scan(push, (mass, jnp.zeros_like(mass)), None, env.max_moves + 1)
    return stopped


def target_law(env: Environment) -> tuple[Float[Array, " S"], Float[Array, ""]]:
    """The law in proportion to the reward [S], and log Z, by enumeration."""
    log_reward = env.log_reward(env.states())
    return jax.nn.softmax(log_reward), jax.nn.logsumexp(log_reward)


def _take(values: Array, index: Array) -> Array:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
