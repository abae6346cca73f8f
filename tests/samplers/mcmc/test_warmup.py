"""Warm-up brings acceptance where it should be, and what it returns is a kernel like any other."""

from __future__ import annotations

import dataclasses
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from samplers.base import Kernel, holding
from samplers.latent import rejuvenation
from samplers.mcmc import chains, suffix, warmup
from samplers.results import MoveInfo, moved
from tests.helpers import TraceCounter
from tests.samplers.mcmc.test_chains import some_strings
from tests.samplers.problems import plain

KEY = jax.random.key(5)


def random_walk(scale: Any) -> Kernel:
    """Over a normal law in the plane; acceptance falls as the scale grows."""
    return rejuvenation.chains(Partial(algorithm, scale))


def algorithm(scale: Any) -> blackjax.SamplingAlgorithm:
    draw = blackjax.mcmc.random_walk.normal(jnp.ones(2) * scale)
    return blackjax.additive_step_random_walk(lambda x: -0.5 * (x**2).sum(), draw)


@pytest.mark.parametrize(("rate", "start"), [(0.3, 0.1), (0.6, 20.0)])
def test_acceptance_comes_to_the_rate(rate: float, start: float):
    adapt = warmup.robbins_monro(rate, gain=4.0)
    found = warmup.run(KEY, random_walk, start, jnp.zeros((64, 2)), adapt=adapt, num_rounds=40)
    assert found.cost is None and len(found.history) == 40 and found.history[-1] == found.params
    assert abs(np.log(float(found.history[-1]) / float(found.history[-10]))) < 0.3
    out = chains.run(KEY, found.kernel, found.x, num_samples=100)
    assert abs(out.info.acceptance_rate.mean() - rate) < 0.03


def added(key: Any, params: Any, state: Any) -> Any:
    """Adds the parameter, to a state that says which parameter `init` saw."""
    return (state[0] + params, state[1]), moved(state[1] == params, changed=jnp.ones(3, bool))


def told(params: Any, x: Any) -> Any:
    return x, jnp.broadcast_to(params, x.shape)


def test_rounds_start_anew_from_the_positions_and_are_compiled_once():
    seen, counter, calls = [], TraceCounter(added), []

    def make(params: Any) -> Kernel:
        return Kernel(Partial(told, params), holding(counter, params))

    def adapt(params: Any, info: MoveInfo, number: int) -> Any:
        # The state that a round steps is of the params that it steps with.
        assert info.accepted.shape == (4, 3) and info.accepted.all()
        calls.append(counter.count)
        seen.append((float(params), number))
        return params + 1

    options = {
        "adapt": adapt,
        "num_rounds": 3,
        "steps_per_round": 4,
        "positions": lambda state: state[0],
    }
    found = warmup.run(KEY, make, 1.0, jnp.zeros(3), **options)
    assert seen == [(1.0, 0), (2.0, 1), (3.0, 2)] and float(found.params) == 4.0
    np.testing.assert_array_equal(found.x, 4 * (1.0 + 2.0 + 3.0) * np.ones(3))
    [last] = jax.tree.leaves(found.kernel.step)
    assert float(last) == 4.0
    assert calls[0] == calls[-1] > 0, "the program of the first round serves all rounds"


def test_the_keys_of_a_warm_up_do_not_depend_on_its_rounds():
    def run(num_rounds: int, steps_per_round: int) -> Any:
        options = {"num_rounds": num_rounds, "steps_per_round": steps_per_round}
        same = lambda params, info, number: params  # noqa: E731
        return warmup.run(KEY, random_walk, 0.5, jnp.zeros((4, 2)), adapt=same, **options).x

    np.testing.assert_array_equal(run(6, 2), run(3, 4))


@pytest.mark.slow
def test_the_temperature_of_a_proposal_comes_to_a_rate():
    rate = 0.55  # at temperature 1 / 1.7 it is 0.66, at 1 0.67, at 2.5 0.53
    make = lambda temperature: suffix.kernel(plain("table") ** 1.7, temperature=temperature)  # noqa: E731
    x = jax.tree.map(lambda leaf: jnp.repeat(leaf, 8, axis=0), some_strings(40))
    adapt = warmup.robbins_monro(rate, gain=4.0, lower=1 / 1.7)
    found = warmup.run(KEY, make, 1 / 1.7, x, adapt=adapt, num_rounds=30)
    assert 1.7 < float(found.params) < 2.6
    assert found.cost is not None and 0 < int(found.cost.tokens) <= 30 * 10 * 320 * 4
    out = chains.run(KEY, found.kernel, found.x, num_samples=60)
    assert abs(float(warmup.acceptance(out.info)) - rate) < 0.02


def test_only_moves_that_were_made_count():
    accepted, proposed = jnp.asarray([[1, 0, 0, 0], [1, 1, 0, 0]], bool)
    info = moved(accepted, changed=accepted, proposed=proposed)
    assert float(warmup.acceptance(info)) == 0.5
    nothing = dataclasses.replace(info, proposed=jnp.zeros(4, bool))
    assert float(warmup.acceptance(nothing)) == 0.0


@pytest.mark.bad_input
def test_bad_input():
    for options in ({"num_rounds": 0}, {"steps_per_round": 0}):
        with pytest.raises(ValueError, match="to be a whole number of at least 1, got 0"):
            warmup.run(
                KEY, random_walk, 1.0, jnp.zeros((4, 2)), adapt=warmup.robbins_monro(0.3), **options
            )
    for rate in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected an acceptance rate between 0 and 1"):
            warmup.robbins_monro(rate)
    with pytest.raises(
        ValueError, match="expected a MoveInfo or an info with `acceptance_rate`, got tuple"
    ):
        warmup.acceptance(())
