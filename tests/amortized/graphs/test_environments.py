"""Environments against enumeration, and every balance objective trained on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amortized.graphs import environments, trajectories
from amortized.graphs.environments import Environment
from amortized.graphs.trajectories import Outputs
from amortized.objectives import balance
from tests.helpers import TraceCounter

# A diamond with a tail and a double edge: 0 -> 1, 2; 1 -> 3; 2 -> 3 (twice), 4; 3 -> 4.
CHILDREN = [[1, 2, -1], [3, -1, -1], [3, 3, 4], [4, -1, -1], [-1, -1, -1]]
REWARDS = [-np.inf, 0.3, -np.inf, -1.0, 1.2]
MODES = [[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]

ENVIRONMENTS: dict[str, Callable[[], Environment]] = {
    "hypergrid": lambda: environments.hypergrid(2, 4, r0=0.1),
    "bit_sequences": lambda: environments.bit_sequences(MODES, word_bits=2),
    "dag": lambda: environments.dag(CHILDREN, REWARDS),
}


def tabular(
    env: Environment, params: dict[str, jax.Array], learned_undos: bool = True
) -> trajectories.Policy:
    def policy(state: jax.Array) -> Outputs:
        at = env.index(state)
        return Outputs(
            params["logits"][at], params["flow"][at], params["undo"][at] if learned_undos else None
        )

    return policy


def table(env: Environment, seed: int | None = None) -> dict[str, jax.Array]:
    shapes = {"logits": env.num_moves + 1, "flow": None, "undo": env.num_undos}
    rng = np.random.default_rng(seed)
    draw: Any = np.zeros if seed is None else lambda shape: rng.normal(size=shape)
    return {
        name: jnp.asarray(
            draw((env.num_states,) if k is None else (env.num_states, k)), jnp.float32
        )
        for name, k in shapes.items()
    }


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_moves_and_undos_are_inverse(name: str):
    env = ENVIRONMENTS[name]()

    @jax.jit
    def all_of_them() -> tuple[jax.Array, ...]:
        states = env.states()
        legal, undos = env.legal(states), env.legal_undos(states)
        return states, env.index(states), legal, undos, env.log_reward(states), env.features(states)

    states, index, legal, legal_undos, log_reward, features = (
        np.asarray(out) for out in all_of_them()
    )
    assert (
        states.shape == (env.num_states, env.initial.shape[0])
        and features.shape[0] == env.num_states
    )
    np.testing.assert_array_equal(index, np.arange(env.num_states))
    assert legal.shape == (env.num_states, env.num_moves + 1) and legal_undos.shape == (
        env.num_states,
        env.num_undos,
    )
    np.testing.assert_array_equal(legal[:, -1], np.isfinite(log_reward))

    @jax.jit
    def there_and_back(move: jax.Array) -> tuple[jax.Array, ...]:
        moves = jnp.full(env.num_states, move)
        at = jnp.asarray(states)
        following, undos = env.step(at, moves), env.undo_of(at, moves)
        return env.index(following), undos, *env.undo(following, undos)

    edges = 0
    for move in range(env.num_moves):
        rows = legal[:, move]
        following, undos, parent, back = (
            np.asarray(out) for out in there_and_back(jnp.int32(move))
        )
        assert legal_undos[following[rows], undos[rows]].all()
        np.testing.assert_array_equal(parent[rows], states[rows])
        assert (back[rows] == move).all()
        edges += rows.sum()
    assert edges == legal_undos.sum()


@pytest.mark.parametrize(
    ("dim", "side", "log_z"), [(2, 8, 2.776581), (2, 20, 4.411586), (4, 20, 8.643297)]
)
def test_hypergrid_log_z(dim: int, side: int, log_z: float):
    env = environments.hypergrid(dim, side)
    np.testing.assert_allclose(jax.jit(lambda: trajectories.target_law(env)[1])(), log_z, atol=2e-6)


def test_rewards():
    grid = environments.hypergrid(2, 8)
    log_reward = jax.jit(grid.log_reward)(jnp.asarray([[0, 0], [1, 6], [3, 0], [1, 0]]))
    np.testing.assert_allclose(np.exp(log_reward), [0.501, 2.501, 0.001, 0.501], rtol=1e-5)
    bits = environments.bit_sequences(MODES, word_bits=2, exponent=2.0)
    log_reward = jax.jit(bits.log_reward)(jnp.asarray([[1, 2], [0, 0], [3, 1], [4, 0]]))
    np.testing.assert_allclose(log_reward, [0.0, -1.0, -0.5, -np.inf], atol=1e-6)


def walks(env: Environment, params: dict[str, jax.Array]) -> dict[int, float]:
    """The terminal law by following every walk, in plain Python."""
    law: dict[int, float] = {}
    stack = [(env.initial, 1.0)]
    while stack:
        state, prob = stack.pop()
        at = int(env.index(state))
        legal = np.asarray(env.legal(state))
        weights = np.where(legal, np.exp(np.asarray(params["logits"][at], np.float64)), 0.0)
        weights /= weights.sum()
        law[at] = law.get(at, 0.0) + prob * weights[-1]
        stack += [
            (env.step(state, jnp.int32(a)), prob * weights[a])
            for a in range(env.num_moves)
            if legal[a]
        ]
    return {at: p for at, p in law.items() if p > 0}


def test_the_terminal_law_is_that_of_all_walks():
    env = environments.dag(CHILDREN, REWARDS)
    params = table(env, seed=0)
    law = jax.jit(lambda: trajectories.terminal_law(env, tabular(env, params)))()
    truth = walks(env, params)
    np.testing.assert_allclose(law, [truth.get(at, 0.0) for at in range(env.num_states)], atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "dag" else pytest.mark.slow) for name in ENVIRONMENTS],
)
def test_rollouts_draw_the_terminal_law_both_ways(name: str):
    env = ENVIRONMENTS[name]()
    params = table(env, seed=1)
    num, epsilon = 4000, 0.3

    @jax.jit
    def sample(key: jax.Array) -> tuple:
        policy = tabular(env, params)
        forward_key, backward_key = jax.random.split(key)
        paths = trajectories.rollout(forward_key, env, policy, num, epsilon)
        last = jnp.take_along_axis(paths.states, paths.length[:, None, None], axis=1)[:, 0]
        back = trajectories.backward_rollout(backward_key, env, last, policy)
        scores = [trajectories.evaluate(env, policy, p)[0] for p in (paths, back)]

        def explored(state: jax.Array) -> Outputs:
            legal = env.legal(state)
            law = jax.nn.softmax(jnp.where(legal, policy(state).logits, -jnp.inf))
            return Outputs(
                jnp.log((1 - epsilon) * law + epsilon * legal / legal.sum(-1, keepdims=True))
            )

        return paths, last, back, scores, trajectories.terminal_law(env, explored)

    paths, last, back, scores, law = sample(jax.random.key(2))
    counts = np.bincount(np.asarray(env.index(last)), minlength=env.num_states) / num
    assert np.isclose(law.sum(), 1, atol=1e-5)
    spread = np.sqrt(np.asarray(law) * (1 - np.asarray(law)) / num) + 1e-6
    assert (np.abs(counts - np.asarray(law)) < 5 * spread).all()
    for drawn, x in zip((paths, back), scores, strict=True):
        states, length = np.asarray(drawn.states), np.asarray(drawn.length)
        made = np.arange(env.max_moves) < length[:, None]
        assert (states[:, 0] == np.asarray(env.initial)).all()
        np.testing.assert_array_equal(states[np.arange(num), length], last)
        stepped = np.asarray(env.step(drawn.states[:, :-1], drawn.moves))
        np.testing.assert_array_equal(
            np.where(made[..., None], stepped, states[:, :-1]), states[:, 1:]
        )
        assert (
            np.isfinite(np.asarray(x.log_pf)[made]).all()
            and np.isfinite(np.asarray(x.log_pb)[made]).all()
        )
        assert int(balance.flags(x)["dead"]) == 0
    # log P_B is that of the draws: its inverse, averaged over trajectories back from one state,
    # counts the ways there.
    log_pb = np.where(
        np.arange(env.max_moves) < np.asarray(back.length)[:, None], np.asarray(scores[1].log_pb), 0
    ).sum(1)
    end = int(np.bincount(np.asarray(env.index(last))).argmax())
    inverse = np.exp(-log_pb[np.asarray(env.index(last)) == end])
    ways = count_ways(env)[end]
    assert abs(inverse.mean() - ways) < 5 * inverse.std() / np.sqrt(inverse.size) + 1e-4


def count_ways(env: Environment) -> np.ndarray:
    """How many paths lead from the first state to each [S]."""
    states = env.states()
    edges = np.zeros((env.num_states, env.num_states))
    for move in range(env.num_moves):
        child = np.asarray(env.index(env.step(states, jnp.full(env.num_states, move))))
        rows = np.flatnonzero(np.asarray(env.legal(states))[:, move])
        np.add.at(edges, (rows, child[rows]), 1)
    ways = at = np.eye(env.num_states)[int(env.index(env.initial))]
    for _ in range(env.max_moves):
        at = at @ edges
        ways = ways + at
    return ways


@pytest.mark.slow
def test_only_states_on_the_way_are_scored_and_nothing_else_changes():
    """More than `SMALL` states: the policy sees a part of them, and values and gradients are those
    of all.
    """
    env = environments.dag(CHILDREN, REWARDS)
    params = table(env, seed=4)
    sizes = []

    def policy_of(params: dict) -> trajectories.Policy:
        def policy(state: jax.Array) -> Outputs:
            sizes.append(state.shape)
            return tabular(env, params)(state)

        return policy

    def loss(params: dict, paths: trajectories.Paths, part: bool) -> jax.Array:
        x, log_flow = trajectories.evaluate(
            env._replace(fixed_length=not part), policy_of(params), paths
        )
        assert log_flow is not None
        return balance.subtb(x, log_flow)

    paths = jax.jit(lambda key: trajectories.rollout(key, env, tabular(env, params), 100))(
        jax.random.key(0)
    )
    some = jax.jit(lambda p: jax.value_and_grad(loss)(p, paths, True))(params)
    assert {shape[0] for shape in sizes} == {50, 100, 200, 400}
    every = jax.jit(lambda p: jax.value_and_grad(loss)(p, paths, False))(params)
    assert sizes[-1] == paths.states.shape
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), some, every)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(some[1]))


def test_rollouts_do_not_depend_on_the_number_of_rows_or_the_compiler():
    env = environments.hypergrid(2, 4)
    policy = tabular(env, table(env, seed=3))
    few = jax.jit(lambda key: trajectories.rollout(key, env, policy, 2, 0.5))(jax.random.key(0))
    counter = TraceCounter(lambda key: trajectories.rollout(key, env, policy, 5, 0.5))
    compiled = jax.jit(counter)
    many = compiled(jax.random.key(0))
    compiled(jax.random.key(1))
    assert counter.count == 1
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), few, many)


Objective = Callable[[dict, balance.Trajectories, jax.Array], jax.Array]
OBJECTIVES: dict[str, Objective] = {
    "tb": lambda p, x, flow: balance.tb(x, flow[0, 0]),
    "vargrad": lambda p, x, flow: balance.vargrad(x),
    "db": lambda p, x, flow: balance.db(x, flow),
    "subtb": lambda p, x, flow: balance.subtb(x, flow),
    "forward_looking": lambda p, x, flow: balance.subtb(x, balance.forward_looking(x, flow)),
    "modified_db": lambda p, x, flow: balance.modified_db(x),
    "modified_subtb": lambda p, x, flow: balance.modified_subtb(x, 0.9),
}


def train(
    env: Environment, names: list[str], steps: int, num: int, learned_undos: bool = False
) -> dict[str, dict]:
    """Tables for several objectives at once, on trajectories that the first one's policy
    explores.
    """

    def policies(params: dict[str, dict]) -> dict[str, trajectories.Policy]:
        return {name: tabular(env, params[name], learned_undos) for name in names}

    def total(params: dict[str, dict], paths: trajectories.Paths) -> jax.Array:
        value = jnp.zeros(())
        for name, policy in policies(params).items():
            x, log_flow = trajectories.evaluate(env, policy, paths)
            assert log_flow is not None
            value += OBJECTIVES[name](params[name], x, log_flow)
        return value

    @jax.jit
    def run(key: jax.Array) -> dict[str, dict]:
        optimizer = optax.adam(optax.cosine_decay_schedule(0.2, steps), b2=0.99)
        params = {name: table(env) for name in names}

        def step(carry: tuple, step_key: jax.Array) -> tuple[tuple, None]:
            params, state = carry
            paths = trajectories.rollout(step_key, env, policies(params)[names[0]], num, 0.3)
            updates, state = optimizer.update(jax.grad(total)(params, paths), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[
            0
        ][0]

    return run(jax.random.key(0))


def check(
    env: Environment, learned: dict[str, dict], tv: float = 0.02, log_z: float = 0.01
) -> None:
    law, truth = trajectories.target_law(env)
    start = env.index(env.initial)
    for name, p in learned.items():
        terminal = jax.jit(lambda p: trajectories.terminal_law(env, tabular(env, p)))(p)
        assert float(0.5 * jnp.abs(terminal - law).sum()) < tv, name
        if name in ("tb", "db", "subtb"):
            assert abs(float(p["flow"][start] - truth)) < log_z, name
        if name in ("modified_db", "modified_subtb"):
            root = (
                env.log_reward(env.initial)
                - jax.nn.log_softmax(
                    jnp.where(env.legal(env.initial), p["logits"][start], -jnp.inf)
                )[-1]
            )
            assert abs(float(root - truth)) < log_z, name


@pytest.mark.slow
@pytest.mark.optimised
def test_every_objective_learns_the_hypergrid():
    env = environments.hypergrid(2, 8)
    check(env, train(env, list(OBJECTIVES), 2000, 16))


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("name", ["bit_sequences", "dag"])
def test_other_environments_are_learned_with_their_backward_policy(name: str):
    env = ENVIRONMENTS[name]()
    check(env, train(env, ["tb", "subtb"], 500, 32, learned_undos=True))


@pytest.mark.slow
@pytest.mark.optimised
def test_a_network_learns_the_hypergrid():
    env = environments.hypergrid(2, 8)
    law, truth = trajectories.target_law(env)
    net = eqx.nn.MLP(16, env.num_moves + 1, 64, 2, key=jax.random.key(1))
    params, static = eqx.partition((net, jnp.zeros(())), eqx.is_inexact_array)
    steps = 2500

    def policy(params: Any) -> trajectories.Policy:
        net = eqx.combine(params, static)[0]
        return lambda s: Outputs(jnp.vectorize(net, signature="(f)->(a)")(env.features(s)))

    def loss(params: Any, paths: trajectories.Paths) -> jax.Array:
        x, _ = trajectories.evaluate(env, policy(params), paths)
        return balance.tb(x, params[1])

    @jax.jit
    def run(key: jax.Array, params: Any) -> tuple[Any, jax.Array]:
        rates = (jax.tree.map(lambda _: "net", params[0]), "log_z")
        schedule = optax.cosine_decay_schedule
        optimizer = optax.multi_transform(
            {"net": optax.adam(schedule(3e-3, steps)), "log_z": optax.adam(schedule(0.1, steps))},
            rates,
        )

        def step(carry: tuple, step_key: jax.Array) -> tuple[tuple, None]:
            params, state = carry
            paths = trajectories.rollout(step_key, env, policy(params), 32, 0.2)
            updates, state = optimizer.update(jax.grad(loss)(params, paths), state)
            return (optax.apply_updates(params, updates), state), None

        params = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[
            0
        ][0]
        return params, trajectories.terminal_law(env, policy(params))

    learned, terminal = run(jax.random.key(0), params)
    assert float(0.5 * jnp.abs(terminal - law).sum()) < 0.02
    assert abs(float(learned[1] - truth)) < 0.01


@pytest.mark.bad_input
def test_bad_environments_say_what_is_wrong():
    with pytest.raises(ValueError, match="side of at least 2"):
        environments.hypergrid(2, 1)
    with pytest.raises(ValueError, match="divide the 4 bits"):
        environments.bit_sequences(MODES, word_bits=3)
    with pytest.raises(ValueError, match="cycle"):
        environments.dag([[1], [0]], [0.0, 0.0])
    with pytest.raises(ValueError, match="neither"):
        environments.dag([[1], [-1]], [0.0, -np.inf])
    with pytest.raises(ValueError, match=r"children in -1\.\.1"):
        environments.dag([[2], [-1]], [0.0, 0.0])
    with pytest.raises(ValueError, match="smaller environment"):
        environments.hypergrid(8, 20).states()
