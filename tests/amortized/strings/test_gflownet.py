"""Guides trained on several small posteriors at once become their samplers; what a loss must not
see is planted.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ppl
from amortized import fit
from amortized.objectives import balance
from amortized.strings import evidence, gflownet, guide, prefix_rewards
from models import tabular
from ppl import exact
from ppl.lm import LM
from tests import helpers

EOS, V, T = 1, 3, 3
BEGINNINGS, ENDINGS = ((2, 0), (0, 2)), ((0, 2), (2, 2))


@functools.cache
def base() -> LM:
    return tabular.random_hmm(jax.random.key(5), 3, V, eos=EOS)


def target_of(lm: LM, example: Any) -> ppl.Target:
    """What stands between a beginning and an ending."""
    prefix = lm.read(example["before"], jnp.int32(2))
    p = ppl.Target(lm, prefix, T)
    return p * ppl.continuation(p, example["after"])


def law_of(lm: LM, example: Any) -> ppl.Target:
    return ppl.Target(lm, lm.read(example["before"], jnp.int32(2)), T)


@functools.cache
def task() -> gflownet.Task:
    examples = {"before": jnp.asarray(BEGINNINGS), "after": jnp.asarray(ENDINGS)}
    return gflownet.Task(base(), examples, target_of, law_of)


def fresh() -> guide.Guide:
    """A table that remembers everything, and knows nothing yet."""
    num = tabular.num_prefixes(V, 2 + T - 1)
    return guide.full(tabular.table(jnp.zeros((num, V)), eos=EOS))


def train(
    objective: gflownet.Objective, steps: int = 1500, **options: Any
) -> tuple[guide.Guide, fit.Fitted]:
    g = fresh()
    training = gflownet.training(g, task(), num=16, objective=objective, slots=8, **options)
    rates = {"guide": optax.adam(optax.cosine_decay_schedule(0.1, steps)), "log_z": optax.adam(0.1)}
    optimizer = optax.multi_transform(rates, {"guide": "guide", "log_z": "log_z"})
    options = {"optimizer": optimizer, "num_steps": steps, "progress": False}
    out = fit.run(jax.random.key(0), training, **options)
    return dataclasses.replace(g, params=out.params["guide"]), out


def distances(g: guide.Guide) -> list[float]:
    return [evidence.total_variation(task().target(i), task().law(g.lm, i)) for i in range(2)]


OBJECTIVES = {
    "tb": (gflownet.tb, prefix_rewards.at_the_end),
    "modified_subtb": (gflownet.modified_subtb, prefix_rewards.at_every_prefix),
}


@pytest.mark.parametrize("name", ["modified_subtb", pytest.param("tb", marks=pytest.mark.slow)])
def test_a_guide_becomes_the_posterior_of_every_example(name: str):
    """Total variation below 1e-3 for both, from scratch, off-policy, with replay; and log Z where
    there is one.
    """
    objective, rewards = OBJECTIVES[name]
    g, out = train(objective, rewards=rewards)
    assert max(distances(g)) < 1e-3
    assert min(distances(fresh())) > 0.1
    log_z = [exact.enumerate_strings(task().target(i)).log_z for i in range(2)]
    if name == "tb":
        np.testing.assert_allclose(out.params["log_z"], log_z, atol=1e-2)
    np.testing.assert_allclose(out.history["log_weight"][-50:].mean(), np.mean(log_z), atol=0.1)
    assert not out.history["dead"].any() and not out.history["invalid"].any()


def stop_twice(params: Any, x: balance.Trajectories, example: Any) -> Any:
    """A wrong mask: the stop at the horizon is scored again."""
    return balance.modified_subtb(dataclasses.replace(x, log_stop=x.log_stop.at[:, -1].set(-1.0)))


def temperature_twice(params: Any, x: balance.Trajectories, example: Any) -> Any:
    return balance.vargrad(dataclasses.replace(x, log_reward=x.log_reward / 0.7))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [stop_twice, temperature_twice])
def test_a_planted_fault_fails(fault: gflownet.Objective):
    g, _ = train(fault)
    assert max(distances(g)) > 0.01


@pytest.mark.slow
def test_a_reward_temperature_powers_the_target():
    """R^(1 / 0.5) = gamma^2, by the third objective."""
    g, _ = train(gflownet.vargrad, rewards=prefix_rewards.at_the_end, temperature=lambda step: 0.5)
    for i in range(2):
        assert evidence.total_variation(task().target(i) ** 2, task().law(g.lm, i)) < 1e-3


@pytest.mark.slow
def test_a_half_trained_guide_is_an_unbiased_proposal():
    """E[Z-hat] = Z for importance sampling, and a larger ESS than the base model's."""
    g, _ = train(gflownet.vargrad, steps=60, rewards=prefix_rewards.at_the_end)
    target, q = task().target(0), task().law(g.lm, 0)
    log_z = exact.enumerate_strings(target).log_z
    runs = jax.vmap(lambda key: evidence.draws(key, target, q, num_particles=4).log_z)
    z = np.exp(np.asarray(runs(jax.random.split(jax.random.key(1), 20_000)), np.float64))
    helpers.assert_z(z / np.exp(log_z), 1.0, resolution=0.01)


@pytest.mark.parametrize(("num", "replayed"), [(1, 0.25), (4, 1.5)])
def test_bad_settings(num: int, replayed: float):
    with pytest.raises(ValueError, match="expected num of at least 2"):
        gflownet.training(fresh(), task(), num=num, replayed=replayed)
