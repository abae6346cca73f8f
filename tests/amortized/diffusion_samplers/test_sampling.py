"""Diffusion samplers obey LAW 1 whatever they have learned, and all weights are alike where the
drift is known.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amortized import fit
from amortized.diffusion_samplers import learning, paths, processes, sampling
from amortized.diffusion_samplers.policy import Policy
from amortized.diffusion_samplers.processes import Bridge, OrnsteinUhlenbeck
from amortized.diffusion_samplers.sampling import Sampler
from amortized.objectives import balance

KEY = jax.random.key(7)
# One program each, in the place of many small ones.
rollout, backward = eqx.filter_jit(paths.rollout), eqx.filter_jit(paths.backward)
evaluate = eqx.filter_jit(paths.evaluate)
outputs = eqx.filter_jit(lambda policy, s, t: policy(s, t, skewed))
loss = eqx.filter_jit(lambda loss, params, states: loss(params, KEY, states)[0])
draw = eqx.filter_jit(lambda draw, params, data: draw(KEY, params, data)[0])
PROCESSES: dict[str, Any] = {
    "bridge": Bridge(1, num_steps=3, variance=1.5),
    "noise": OrnsteinUhlenbeck(1, num_steps=3, scale=1.2, rate=1.5),
}
LOG_Z = 0.7


def skewed(x):
    """Two Gaussians of unequal mass, variance 0.36, and exp(LOG_Z) in all."""
    log_p = jax.nn.logsumexp(
        jnp.log(jnp.array([0.7, 0.3])) - 0.5 * (x[0] - jnp.array([-0.6, 1.1])) ** 2 / 0.36
    )
    return log_p - 0.5 * math.log(2 * math.pi * 0.36) + LOG_Z


MEAN = 0.7 * -0.6 + 0.3 * 1.1


def disturbed(dim: int, **options: Any) -> Policy:
    """As after some training."""
    policy = Policy(KEY, dim, width=8, depth=1, **options)
    leaves, structure = jax.tree.flatten(policy)
    keys = jax.random.split(KEY, len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape) if eqx.is_inexact_array(leaf) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def normal(x, mean, variance):
    x, mean = np.asarray(x, np.float64), np.asarray(mean, np.float64)
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance)).sum(-1)


def log_weights_by_hand(process, policy, states):
    """In numpy, from the formulas of the two papers."""
    num, total = process.num_steps, []
    for path in np.asarray(states, np.float64):
        log_w = float(skewed(jnp.asarray(path[-1], jnp.float32)))
        if isinstance(process, OrnsteinUhlenbeck):
            log_w -= normal(path[0], 0, process.scale**2)
        for i in range(num):
            out = outputs(policy, jnp.asarray(path[i], jnp.float32), jnp.float32(i / num))
            drift = np.asarray(out.drift, np.float64)
            if isinstance(process, Bridge):
                keep, v = 1.0, process.variance / num
                share, w = i / (i + 1), v * i / (i + 1)
            else:
                a = 1 - math.exp(-process.rate / num)
                keep, v = math.sqrt(1 - a), a * process.scale**2
                share, w = keep, v
            wide = v * math.exp(float(out.log_variance))
            log_w -= normal(path[i + 1], keep * path[i] + v * drift, wide)
            log_w += normal(path[i], share * path[i + 1], w) if w else 0.0
        total.append(log_w)
    return np.array(total)


@pytest.mark.parametrize("name", PROCESSES)
def test_weights_of_paths_ahead_and_back_are_those_of_the_formulas(name: str):
    process, policy = PROCESSES[name], disturbed(1)
    ahead = rollout(KEY, process, policy, skewed, 3, explore=0.3)
    back = backward(KEY, process, jnp.array([[0.4], [-1.0]]))
    assert ahead.shape == (3, 4, 1) and (back[:, -1, 0] == jnp.array([0.4, -1.0])).all()
    if name == "bridge":
        assert not ahead[:, 0].any() and not back[:, 0].any()
    states = jnp.concatenate([ahead, back])
    x = evaluate(process, policy, skewed, states)
    np.testing.assert_allclose(
        paths.log_weights(x), log_weights_by_hand(process, policy, states), rtol=1e-4, atol=1e-4
    )
    # Trajectory balance sees the same numbers.
    found = balance.tb(x, 0.2)
    np.testing.assert_allclose(found, ((paths.log_weights(x) - 0.2) ** 2).mean(), rtol=1e-4)


def replicas(sampler: Sampler, threshold: float, num: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """exp(log_z), and with the mean of x, of many small runs."""

    def one(key):
        out = sampling.run(key, sampler, num_particles=8, threshold=threshold)
        mean = (jnp.exp(out.log_weights) * out.samples[:, 0]).mean()
        return jnp.exp(out.log_z), jnp.exp(out.log_z) * mean

    found = jax.jit(jax.vmap(one))(jax.random.split(KEY, num))
    first, second = (np.asarray(x, np.float64) for x in found)
    return first, second


def z(values: np.ndarray, truth: float) -> float:
    return (values.mean() - truth) / (values.std() / len(values) ** 0.5)


@pytest.mark.parametrize("threshold", [0.0, 0.9])
@pytest.mark.parametrize("name", PROCESSES)
def test_law_1(name: str, threshold: float):
    sampler = Sampler(PROCESSES[name], disturbed(1), skewed)
    totals, firsts = replicas(sampler, threshold)
    evidence = math.exp(LOG_Z)
    assert totals.std() / len(totals) ** 0.5 < 0.03 * evidence
    assert abs(z(totals, evidence)) < 5 and abs(z(firsts, evidence * MEAN)) < 5


class Started(OrnsteinUhlenbeck):
    """A fault: the start's density is forgotten."""

    def log_start(self, s):
        return jnp.zeros((), s.dtype)


class Widened(Bridge):
    """A fault: the bridge back is as wide as the way ahead."""

    def back(self, i):
        share, _ = super().back(i)
        return share, jnp.where(share > 0, self.variance / self.num_steps, 0.0)


FAULTS = (
    Started(1, num_steps=3, scale=1.0, rate=1.5),
    Widened(1, num_steps=3, variance=1.0),
)


@pytest.mark.parametrize("process", FAULTS)
def test_a_planted_fault_fails(process: Any):
    totals, _ = replicas(Sampler(process, disturbed(1), skewed), 0.0)
    expected = math.exp(LOG_Z)
    if isinstance(process, Widened):  # P_B is still normalised, so log Z alone does not tell
        states = rollout(KEY, process, disturbed(1), skewed, 3)
        found = paths.log_weights(evaluate(process, disturbed(1), skewed, states))
        by_hand = log_weights_by_hand(Bridge(1, num_steps=3), disturbed(1), states)
        assert not np.allclose(found, by_hand, atol=1e-2)
    else:
        assert abs(z(totals, expected)) > 5


@pytest.mark.parametrize(
    "process", [Bridge(2, num_steps=5, variance=2.0), OrnsteinUhlenbeck(2, num_steps=5)]
)
def test_where_the_drift_is_known_every_path_weighs_z(process: Any):
    """The process's own last law as the energy: no drift is needed."""
    variance = 2.0 if isinstance(process, Bridge) else 1.0

    def own(x):
        return processes.log_normal(x, jnp.zeros(2), jnp.float32(variance)) + LOG_Z

    sampler = Sampler(process, Policy(KEY, 2), own)
    x = variance**0.5 * jax.random.normal(KEY, (20, 2))
    for log_w in (sampling.elbo(KEY, sampler, 20), sampling.eubo(KEY, sampler, x)):
        np.testing.assert_allclose(log_w, LOG_Z, atol=2e-4)
    # So trajectory balance and the variance of log w vanish there.
    training = learning.training(KEY, own, process, policy=sampler.policy, batch_size=8)
    params = training.params | {"log_z": jnp.float32(LOG_Z)}
    assert float(loss(training.loss, params, draw(training.draw, params, training.data))) < 1e-6


def test_flows_that_are_right_balance_every_stretch():
    """Of noise that stays noise, and an energy that is its own law, F_i is that law times Z."""
    process = OrnsteinUhlenbeck(2, num_steps=6)

    def own(x):
        return processes.log_normal(x, jnp.zeros(2), jnp.float32(1.0))

    training = learning.training(
        KEY, own, process, policy=Policy(KEY, 2), objective=learning.subtb, batch_size=8
    )
    states = draw(training.draw, training.params, training.data)
    assert float(loss(training.loss, training.params, states)) < 1e-6
    wrong = training.params | {"log_z": jnp.float32(0.5)}
    assert float(loss(training.loss, wrong, states)) > 0.01


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_paths_may_cross_where_the_density_is_zero(threshold: float):
    """Z of half a Gaussian; a state on the way is no draw."""

    def half(x):
        return jnp.where(x[0] > 0, -0.5 * x[0] ** 2, -jnp.inf)

    process = OrnsteinUhlenbeck(1, num_steps=3, rate=1.5)
    totals, firsts = replicas(Sampler(process, disturbed(1), half), threshold)
    assert abs(z(totals, math.sqrt(math.pi / 2))) < 5 and abs(z(firsts, 1.0)) < 5
    assert totals.std() / len(totals) ** 0.5 < 0.02


def test_a_reward_of_zero_kills_and_one_that_is_no_number_is_counted():
    def half(x):
        return jnp.where(x[0] > 0, -0.5 * (x**2).sum(), -jnp.inf)

    sampler = Sampler(Bridge(1, num_steps=2), Policy(KEY, 1, langevin=False), half)
    out = sampling.run(KEY, sampler, num_particles=50, threshold=0.5)
    alive = np.asarray(out.log_weights) > -np.inf
    assert (np.asarray(out.samples)[alive, 0] > 0).all() and 0 < alive.sum() < 50
    broken = dataclasses.replace(sampler, log_density=lambda x: jnp.where(x[0] > 0, jnp.nan, 0.0))
    out = sampling.run(KEY, broken, num_particles=50)
    assert int(out.num_invalid) > 0 and np.isfinite(out.log_z)


def test_the_buffer_keeps_the_newest_and_prefers_the_best():
    empty = learning.Buffer(jnp.zeros((6, 1)), jnp.full(6, -jnp.inf))
    some = empty.add(jnp.array([[1.0], [2.0]]), jnp.array([0.0, 3.0]))
    taken = np.asarray(some.take(KEY, 4000))[:, 0]
    # Ranks 0 and 1 of 6, so weights 1 / 0.06 and 1 / 1.06; nothing from empty places.
    share = (1 / 0.06) / (1 / 0.06 + 1 / 1.06)
    assert set(taken) == {1.0, 2.0} and abs((taken == 2).mean() - share) < 0.02
    full = some.add(jnp.arange(5.0)[:, None], jnp.zeros(5))
    np.testing.assert_array_equal(full.x[:, 0], [2, 0, 1, 2, 3, 4])


def test_the_search_leaves_the_energy_as_it_is():
    """Langevin moves from exact draws stay exact draws."""

    def own(x):
        return -0.5 * (x**2).sum()

    x = jax.random.normal(KEY, (2000, 1))
    found, log_r, rate = eqx.filter_jit(learning.langevin)(KEY, own, x, jnp.float32(0.5), 10)
    assert found.shape == (10_000, 1) and 0.5 < float(rate) < 1
    np.testing.assert_allclose(log_r, jax.vmap(own)(found), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([found.mean(), found.var()], [0, 1], atol=0.1)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("how", ["tb", "vargrad", "subtb", "reverse_kl"])
def test_what_is_learned_comes_close_to_log_z_from_both_sides(how: str):
    process = Bridge(1, num_steps=12, variance=1.5)
    if how == "reverse_kl":
        training = learning.reverse_kl(KEY, skewed, process, batch_size=128)
    else:
        search = learning.Search(every=20, num_steps=20, num_chains=16, size=400, step_size=0.1)
        objective = getattr(learning, how)
        training = learning.training(
            KEY, skewed, process, objective=objective, explore=0.2, search=search, batch_size=128
        )
    rates = {"policy": optax.adam(2e-3), "log_z": optax.adam(5e-2)}
    out = fit.run(
        KEY, training, optimizer=learning.optimizer(**rates), num_steps=800, progress=False
    )
    sampler = learning.sampler(training, out)
    first, second = jax.random.split(KEY)
    right = jax.random.bernoulli(first, 0.3, (2000, 1))
    x = jnp.where(right, 1.1, -0.6) + 0.6 * jax.random.normal(second, (2000, 1))
    low = np.asarray(sampling.elbo(KEY, sampler))
    high = np.asarray(sampling.eubo(KEY, sampler, x))
    assert z(low, LOG_Z) < 5 and z(high, LOG_Z) > -5
    assert LOG_Z - low.mean() < 0.1 and high.mean() - LOG_Z < 0.1
    if how in ("tb", "subtb"):
        np.testing.assert_allclose(out.params["log_z"], LOG_Z, atol=0.1)


@pytest.mark.bad_input
def test_bad_input():
    process = Bridge(2)
    with pytest.raises(ValueError, match=r"one number for a point \[2\], got shape \[2\]; sum"):
        learning.training(KEY, lambda x: x, process)
    with pytest.raises(ValueError, match="expected a process, got str; pass processes.Bridge"):
        learning.training(KEY, lambda x: x.sum(), "bridge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected variance to be a number above 0, got 0"):
        Bridge(2, variance=0)
    with pytest.raises(ValueError, match="expected dim to be a whole number of at least 1"):
        OrnsteinUhlenbeck(0)
    with pytest.raises(ValueError, match="expected batch_size to be a whole number"):
        learning.reverse_kl(KEY, lambda x: x.sum(), process, batch_size=0)
    sampler = Sampler(process, Policy(KEY, 2), lambda x: x.sum())
    with pytest.raises(
        ValueError, match="expected num_particles to be a whole number of at least 1"
    ):
        sampling.run(KEY, sampler, num_particles=0)
