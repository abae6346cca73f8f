"""Balance objectives on the prefix tree of `prefix_tree`, whose exact policy and log Z
are known.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amortized.objectives import balance, regression
from amortized.objectives.balance import Trajectories

from .. import prefix_tree as tree

TEMPERATURE = 0.7
Params = dict[str, jax.Array]  # logits [121, 4], flow [121], the root's being log Z
Objective = Callable[[Params, Trajectories], jax.Array]


def flows(p: Params) -> jax.Array:
    return p["flow"][tree.PREFIXES]


def relative(p: Params, x: Trajectories) -> jax.Array:
    """With a prior that is uniform over strings and r = R^2 121, beta = 1/2."""
    prior = jnp.full(tree.NUM, -jnp.log(tree.NUM))
    log_r = 2 * (jnp.asarray(tree.LOG_REWARDS) - prior)
    return balance.relative_tb(tree.log_prob(p["logits"]), prior, log_r, p["flow"][0], beta=0.5)


def looking(p: Params, x: Trajectories) -> jax.Array:
    return balance.forward_looking(x, p["residual"][tree.PREFIXES])


OBJECTIVES: dict[str, Objective] = {
    "tb": lambda p, x: balance.tb(x, p["flow"][0]),
    "vargrad": lambda p, x: balance.vargrad(x),
    "relative_tb": relative,
    "db": lambda p, x: balance.db(x, flows(p)),
    "subtb": lambda p, x: balance.subtb(x, flows(p)),
    "modified_db": lambda p, x: balance.modified_db(x),
    "modified_subtb": lambda p, x: balance.modified_subtb(x),
    "modified_subtb .9": lambda p, x: balance.modified_subtb(x, 0.9),
    "forward_looking db": lambda p, x: balance.db(x, looking(p, x)),
    "forward_looking subtb": lambda p, x: balance.subtb(x, looking(p, x)),
    "tb cosh": lambda p, x: balance.tb(x, tree.LOG_Z, regression.cosh),
    "tb linex": lambda p, x: balance.tb(x, tree.LOG_Z, regression.linex(1)),
}


def trajectories(logits: jax.Array, temperature: float = 1.0) -> Trajectories:
    return balance.strings(*tree.arrays(logits), temperature=temperature)


def test_every_objective_is_zero_at_the_exact_policy_and_nowhere_near():
    with jax.enable_x64(True):
        logits, flow = tree.exact_policy()
        residual = jnp.asarray(flow - tree.LOG_REWARDS)
        p = {"logits": jnp.asarray(logits), "flow": jnp.asarray(flow), "residual": residual}

        @jax.jit
        def values(p: Params) -> dict[str, jax.Array]:
            return {
                name: objective(p, trajectories(p["logits"]))
                for name, objective in OBJECTIVES.items()
            }

        exact, wrong = values(p), values({**p, "logits": p["logits"].at[1, 2].add(0.3)})
        roots = np.asarray(balance.implied_log_flow(trajectories(p["logits"]))[:, 0])
    np.testing.assert_allclose(flow[0], tree.LOG_Z, atol=5e-7)
    np.testing.assert_allclose(roots, flow[0], atol=1e-14)
    for name, value in exact.items():
        assert abs(float(value)) < (1e-12 if name in ("tb cosh", "tb linex") else 1e-28), (
            name
        )  # log Z of six decimals there
        assert float(wrong[name]) > 1e-6, name


def train(losses: dict[str, Callable[[Params], jax.Array]], steps: int) -> dict[str, Params]:
    """All at once from a random policy: separate parameters, and Adam treats each on its own."""

    @jax.jit
    def run() -> dict[str, Params]:
        def total(params: dict[str, Params]) -> jax.Array:
            return sum((loss(params[name]) for name, loss in losses.items()), jnp.zeros(()))

        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(total)(params), state)
            return (optax.apply_updates(params, updates), state), None

        optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps), b2=0.99)
        flow, logits = jnp.zeros(tree.NUM), jax.random.normal(jax.random.key(4), (tree.NUM, 4))
        params = {name: {"logits": logits, "flow": flow, "residual": flow} for name in losses}
        return jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[0][0]

    return run()


def scored(objective: Objective, **options: float) -> Callable[[Params], jax.Array]:
    return lambda p: objective(p, trajectories(p["logits"], **options))


@pytest.mark.slow
@pytest.mark.optimised
def test_every_objective_learns_the_law_from_scratch():
    learned = train({name: scored(objective) for name, objective in OBJECTIVES.items()}, 1500)
    for name, p in learned.items():
        assert tree.total_variation(p["logits"]) < 1e-3, name
        if name in ("tb", "db", "subtb", "relative_tb"):
            np.testing.assert_allclose(p["flow"][0], tree.LOG_Z, atol=2e-3, err_msg=name)
        if name.startswith("modified"):
            root = balance.implied_log_flow(trajectories(p["logits"]))[0, 0]
            np.testing.assert_allclose(root, tree.LOG_Z, atol=1e-3, err_msg=name)


def test_two_objectives_learn_and_planted_faults_do_not():
    """The faults: a buffer's log q, a stop that is scored where the horizon cuts, a temperature
    applied twice.
    """
    modified = OBJECTIVES["modified_subtb"]
    before = tree.arrays(jnp.zeros((tree.NUM, 4)))

    def stale(p: Params) -> jax.Array:
        return modified(p, balance.strings(*tree.arrays(p["logits"])._replace(log_q=before.log_q)))

    def free_stop(p: Params) -> jax.Array:
        x = tree.arrays(p["logits"])
        return modified(p, dataclasses.replace(balance.strings(*x), log_stop=x.log_q_stop))

    def twice(p: Params) -> jax.Array:
        x = tree.arrays(p["logits"])
        tempered = x._replace(log_reward=x.log_reward / TEMPERATURE)
        return modified(p, balance.strings(*tempered, temperature=TEMPERATURE))

    tempered = scored(modified, temperature=TEMPERATURE)
    good = {
        "plain": scored(modified),
        "vargrad": scored(OBJECTIVES["vargrad"]),
        "tempered": tempered,
    }
    faults = {"stale": stale, "free_stop": free_stop, "twice": twice}
    cold = tree.law() ** (1 / TEMPERATURE)
    cold = cold / cold.sum()
    learned = train({**good, **faults}, 500)
    for name, p in learned.items():
        distance = tree.total_variation(
            p["logits"], cold if name in ("tempered", "twice") else None
        )
        assert (distance < 1e-3) if name in good else (distance > 0.01), (name, distance)


ZERO = np.array([len(s) == 0 or s[-1] == 1 for s in tree.STRINGS])
"""The empty string, which is the root, and all that end with a letter in the middle."""


@pytest.mark.parametrize(
    "names",
    [
        ("modified_subtb",),
        pytest.param(
            ("vargrad", "tb", "db", "subtb", "modified_db", "flow"), marks=pytest.mark.slow
        ),
    ],
)
def test_zero_rewards_are_seen_only_when_they_are_floored(names: tuple[str, ...]):
    """With the floor the law of the others is reached but for e^-10; without it a policy spends any
    share on what is forbidden, at no loss.
    """
    log_rewards = jnp.where(ZERO, -jnp.inf, tree.LOG_REWARDS)
    truth = np.where(ZERO, 0.0, tree.law())
    truth = truth / truth.sum()
    prior = jnp.full(tree.NUM, -np.log(tree.NUM))
    objectives = OBJECTIVES | {
        "modified_db": lambda p, x: balance.modified_db(x, flows(p), log_z=p["flow"][0]),
        "modified_subtb": lambda p, x: balance.modified_subtb(x, log_z=balance.log_z(x)),
        "flow": lambda p, x: balance.modified_subtb(x, 1.0, flows(p), p["flow"][0]),
    }

    def seen(p: Params, floor: bool) -> Trajectories:
        x = tree.arrays(p["logits"])._replace(log_reward=log_rewards[tree.PREFIXES])
        return balance.floored(balance.strings(*x), prior) if floor else balance.strings(*x)

    losses = {
        f"{name} {floor}": lambda p, name=name, floor=floor: objectives[name](p, seen(p, floor))
        for name in names
        for floor in (True, False)
    }
    for which, p in train(losses, 1000).items():
        distance = tree.total_variation(p["logits"], truth)
        floored = which.endswith("True")
        assert (distance < 1e-3) if floored else (distance > 0.01), (which, distance)
        assert floored or float(losses[which](p)) < 1e-9, which


def double_loop(c: np.ndarray, known: np.ndarray, lam: float) -> tuple[float, float]:
    total = norm = 0.0
    for i in range(len(c)):
        for j in range(i + 1, len(c)):
            if known[i] and known[j]:
                total += lam ** (j - i - 1) * (c[i] - c[j]) ** 2
                norm += lam ** (j - i - 1)
    return total, norm


def random_trajectories(seed: int, num: int = 7, moves: int = 6) -> tuple[Trajectories, np.ndarray]:
    """Random scores, P_B included, with some states that cannot stop; and state flows."""
    rng = np.random.default_rng(seed)
    log_reward = np.where(
        rng.random((num, moves + 1)) < 0.2, -np.inf, 2 * rng.normal(size=(num, moves + 1))
    )
    length = rng.integers(0, moves + 1, num)
    log_reward[np.arange(num), length] = rng.normal(size=num)
    drawn = [jnp.asarray(-np.abs(rng.normal(size=(num, k)))) for k in (moves, moves, moves + 1)]
    x = Trajectories(
        *drawn,
        jnp.asarray(log_reward),
        jnp.asarray(length, jnp.int32),
        jnp.asarray(rng.random(num)),
    )
    return x, rng.normal(size=(num, moves + 1))


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0, 1.2])
def test_the_linear_forms_equal_the_double_loop(lam: float):
    with jax.enable_x64(True):
        x, log_flow = random_trajectories(3)
        ours = jax.jit(
            lambda: (balance.subtb(x, jnp.asarray(log_flow), lam), balance.modified_subtb(x, lam))
        )()
        steps = (
            jax.jit(lambda: (balance.db(x, jnp.asarray(log_flow)), balance.modified_db(x)))()
            if lam == 0
            else ours
        )
    pf, pb, stop, reward, weight = (
        np.asarray(v) for v in (x.log_pf, x.log_pb, x.log_stop, x.log_reward, x.weight)
    )
    for modified, value, by_steps in ((False, ours[0], steps[0]), (True, ours[1], steps[1])):
        sums = np.zeros(2)
        for row, n in enumerate(np.asarray(x.length)):
            total = np.concatenate([[0.0], np.cumsum(pf[row] - pb[row])])[: n + 1]
            flow = (reward[row] - stop[row] if modified else log_flow[row])[: n + 1]
            c = total - flow
            if not modified:
                c = np.append(c, total[n] + stop[row, n] - reward[row, n])
            sums += weight[row] * np.array(double_loop(c, np.isfinite(c), lam))
        np.testing.assert_allclose(value, sums[0] / sums[1], rtol=1e-12)
        np.testing.assert_allclose(by_steps, value, rtol=1e-12)


@pytest.mark.parametrize("lam", [1.0, 0.9, 0.999])
def test_nothing_cancels_in_float32(lam: float):
    """Entries near 300 with a spread of 0.01, where the difference of raw sums is 0 or noise."""
    c = (300 + 0.01 * np.random.default_rng(0).normal(size=30)).astype(np.float32)
    known = np.ones(30, bool)
    exact, norm = double_loop(c.astype(np.float64), known, lam)
    sums = balance._all_pairs if lam == 1 else balance._near_pairs
    args = (jnp.asarray(c)[None], jnp.asarray(known)[None])
    total, ours_norm = jax.jit(sums if lam == 1 else functools.partial(sums, lam=lam))(*args)
    np.testing.assert_allclose(
        total[0], exact, rtol=2e-3
    )  # of which the mean's own rounding is the most
    np.testing.assert_allclose(ours_norm[0], norm, rtol=1e-6)
    raw = 30 * (c**2).sum() - c.sum() ** 2
    assert abs(raw - double_loop(c.astype(np.float64), known, 1.0)[0]) > 0.01


def test_on_policy_gradients_are_that_of_the_divergence():
    """Expectations by enumeration: a trajectory weighs as much as it is probable."""
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(1).normal(size=(tree.NUM, 4)))
        log_p = jnp.log(jnp.asarray(tree.law()))

        def weighted(logits: jax.Array) -> Trajectories:
            weight = jax.lax.stop_gradient(jnp.exp(tree.log_prob(logits)))
            return balance.strings(*tree.arrays(logits), weight=weight)

        def divergence(logits: jax.Array) -> jax.Array:
            log_q = tree.log_prob(logits)
            return (jnp.exp(log_q) * (log_q - log_p)).sum()

        @jax.jit
        def gradients() -> tuple[jax.Array, ...]:
            return (
                jax.grad(divergence)(logits),
                jax.grad(lambda v: balance.tb(weighted(v), -7.0, regression.half_square))(logits),
                jax.grad(lambda v: balance.vargrad(weighted(v)))(logits),
            )

        exact, tb, vargrad = gradients()
    assert np.abs(exact).max() > 0.05
    np.testing.assert_allclose(tb, exact, atol=1e-12)
    np.testing.assert_allclose(vargrad, exact, atol=1e-12)


def test_zero_and_invalid_rewards_are_counted_and_give_no_gradient():
    p = {
        "logits": jnp.zeros((tree.NUM, 4)),
        "flow": jnp.zeros(tree.NUM),
        "residual": jnp.zeros(tree.NUM),
    }
    log_reward = np.array(tree.LOG_REWARDS)
    log_reward[[3, 50, 51]] = -np.inf
    log_reward[60], log_reward[61] = np.nan, np.inf

    def batch(p: Params, rewards: np.ndarray) -> Trajectories:
        x = tree.arrays(p["logits"])
        x = x._replace(
            log_reward=jnp.asarray(rewards)[tree.PREFIXES], log_q=x.log_q.at[7, 0].set(-jnp.inf)
        )
        return balance.strings(*x)

    @jax.jit
    def gradients(rewards: jax.Array) -> dict:
        kept = {
            name: OBJECTIVES[name]
            for name in ("tb", "vargrad", "db", "modified_subtb", "modified_subtb .9")
        }
        return {
            n: jax.value_and_grad(lambda p, f=f: f(p, batch(p, rewards)))(p)
            for n, f in kept.items()
        }

    assert {k: int(v) for k, v in balance.flags(batch(p, log_reward)).items()} == {
        "dead": 3,
        "invalid": 2,
    }
    for name, (value, gradient) in gradients(jnp.asarray(log_reward)).items():
        assert value > 0, name
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)), name
    nothing = np.full(tree.NUM, -np.inf)
    assert int(balance.flags(batch(p, nothing))["dead"]) == tree.NUM
    for name, (value, gradient) in gradients(jnp.asarray(nothing)).items():
        if name != "db":  # whose flows still balance among themselves
            assert value == 0 and all((leaf == 0).all() for leaf in jax.tree.leaves(gradient)), name
    dead = balance.relative_tb(jnp.zeros(2), jnp.zeros(2), jnp.asarray([-jnp.inf, jnp.nan]), 0.0)
    assert dead == 0


def test_prompts_have_a_log_z_each_or_none():
    with jax.enable_x64(True):
        x, _ = random_trajectories(5, num=9)
        groups = jnp.asarray([0, 1, 2, 0, 1, 2, 1, 1, 0])
        one = [jax.tree.map(lambda leaf, g=g: leaf[groups == g], x) for g in range(3)]
        weight = [float(part.weight.sum()) for part in one]
        log_z = jnp.asarray([0.3, -1.0, 2.0])

        @jax.jit
        def values() -> dict[str, tuple]:
            best = jax.grad(lambda z: balance.tb(one[1], z))(0.0) / -2
            return {
                "vargrad": (balance.vargrad(x, groups), [balance.vargrad(part) for part in one]),
                "tb": (
                    balance.tb(x, log_z[groups]),
                    [balance.tb(part, log_z[g]) for g, part in enumerate(one)],
                ),
                "best": (balance.vargrad(one[1]), balance.tb(one[1], best, regression.half_square)),
            }

        both = values()
    for name in ("vargrad", "tb"):
        together, separate = both[name]
        np.testing.assert_allclose(together, np.average(separate, weights=weight), rtol=1e-12)
    np.testing.assert_allclose(*both["best"], rtol=1e-12)  # VarGrad is the best that log Z can do


def test_states_that_cannot_stop_take_a_learned_flow():
    x, log_flow = random_trajectories(6)
    given = jax.jit(balance.implied_log_flow)(x, jnp.asarray(log_flow))
    stops = np.isfinite(np.asarray(x.log_reward))
    np.testing.assert_allclose(
        given, np.where(stops, np.asarray(x.log_reward - x.log_stop), log_flow), rtol=1e-6
    )
    gradient = jax.jit(jax.grad(lambda f: balance.modified_subtb(x, log_flow=f)))(
        jnp.asarray(log_flow)
    )
    within = np.arange(log_flow.shape[1]) <= np.asarray(x.length)[:, None]
    assert ((np.asarray(gradient) != 0) == (~stops & within)).all()


def test_a_trajectory_of_weight_zero_changes_nothing():
    x, log_flow = random_trajectories(8)
    flow = jnp.asarray(log_flow)
    without = jax.tree.map(lambda leaf: leaf[1:], x)
    x = dataclasses.replace(x, weight=x.weight.at[0].set(0.0))

    @jax.jit
    def values(x: Trajectories, flow: jax.Array) -> list[jax.Array]:
        return [
            balance.tb(x, 1.0),
            balance.vargrad(x),
            balance.subtb(x, flow),
            balance.modified_db(x),
        ]

    np.testing.assert_allclose(values(x, flow), values(without, flow[1:]), rtol=1e-6)
