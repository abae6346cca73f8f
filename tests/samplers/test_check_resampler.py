"""The conformance kit of resamplers: ours pass, planted faults do not; and what a faulty one does
in a run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers import base, population, resampling, smc
from samplers.base import Particles
from samplers.testing import check_resampler
from tests.samplers.problems import RESAMPLERS, target_of

KEY = jax.random.key(6)
GOOD = RESAMPLERS | {"optimal": resampling.optimal, "gumbel_top_k": resampling.gumbel_top_k}


@pytest.mark.parametrize("name", GOOD)
def test_ours_pass(name: str):
    check_resampler(GOOD[name], key=KEY)


def shifted(key: Any, log_probs: Any, num: int) -> Any:
    return (resampling.systematic(key, log_probs, num) + 1) % num


def sharpened(key: Any, log_probs: Any, num: int) -> Any:
    return resampling.multinomial(key, 1.1 * log_probs, num)


def unweighted(key: Any, log_probs: Any, num: int) -> Any:
    """Without replacement, as if all draws weighed the same."""
    return resampling.gumbel_top_k(key, log_probs, num)[0]


def greedy(key: Any, log_probs: Any, num: int) -> Any:
    return jnp.full(num, jnp.argmax(log_probs), jnp.int32)


def reviving(key: Any, log_probs: Any, num: int) -> Any:
    """Dead particles live on."""
    return resampling.multinomial(key, jnp.maximum(log_probs, -13.0), num)


def not_normalised(key: Any, log_probs: Any, num: int) -> Any:
    """Takes log-probabilities for log-shares."""
    kept = jnp.exp(log_probs) * num > jax.random.uniform(key, (num,))
    return jnp.where(kept, jnp.arange(num), jnp.argmax(log_probs)).astype(jnp.int32)


def out_of_range(key: Any, log_probs: Any, num: int) -> Any:
    return resampling.systematic(key, log_probs, num) + 1


def double_weights(key: Any, log_probs: Any, num: int) -> Any:
    ancestors = resampling.systematic(key, log_probs, num)
    return ancestors, jnp.full(num, jnp.log(2.0))


BIASED = [
    shifted,
    sharpened,
    unweighted,
    greedy,
    reviving,
    not_normalised,
    out_of_range,
    double_weights,
    resampling.conditional_multinomial,
]


@pytest.mark.parametrize("faulty", BIASED, ids=lambda f: f.__name__)
def test_a_planted_fault_fails(faulty: Any):
    with pytest.raises(AssertionError, match="z = |ancestors must be in 0..6"):
        check_resampler(faulty, key=KEY)


SHAPES: dict[str, Any] = {
    r"float32\[4\]": lambda key, p, num: resampling.systematic(key, p, num).astype(jnp.float32),
    r"int32\[3\]": lambda key, p, num: resampling.systematic(key, p, num)[1:],
    r"int32\[4\], float32\[1\]": lambda key, p, num: (jnp.arange(4), jnp.zeros(1)),
    r"bool\[4\]": lambda key, p, num: p > 0,
    r"int32\[4\], int32\[4\]": lambda key, p, num: (jnp.arange(4), jnp.arange(4)),
    r"list\[\]": lambda key, p, num: [0, 1, 2, 3],
}


@pytest.mark.bad_input
@pytest.mark.parametrize("got", SHAPES)
def test_a_run_refuses_what_are_no_ancestors(got: str):
    """Floats were once truncated in silence, and log Z was wrong."""
    p = Particles(jnp.arange(4), jnp.zeros(4), jnp.float32(0))
    message = rf"expected a resampler to give ancestors int32\[4\], .*, got {got}; check it with"
    with pytest.raises(ValueError, match=message):
        base.resample(KEY, p, SHAPES[got], jnp.bool_(True))


def test_nobody_takes_the_place_of_nobody():
    """An ancestor that there is not is dead, and counted; its weight goes to nobody else."""
    log_weights = jnp.log(jnp.array([0.5, 1.5, 1.0, 1.0], jnp.float32))
    run = population.start(Particles(jnp.arange(4), log_weights, jnp.float32(0.3)), 1)

    def some(key: Any, log_probs: Any, num: int) -> Any:
        return jnp.array([1, 4, -1, 3], jnp.int32)

    out = population.select(KEY, run, some, population.ALWAYS)
    np.testing.assert_array_equal(out.particles.log_weights, [0, -jnp.inf, -jnp.inf, 0])
    assert int(out.num_invalid) == 2 and out.particles.state[0] == 1
    np.testing.assert_array_equal(out.roots, [1, 0, 0, 3])
    assert int(population.select(KEY, run, resampling.ssp, population.ALWAYS).num_invalid) == 0


@pytest.mark.bad_input
def test_a_whole_run_says_it():
    def floats(key: Any, log_probs: Any, num: int) -> Any:
        return resampling.systematic(key, log_probs, num) + 0.5

    with pytest.raises(ValueError, match="expected a resampler to give ancestors"):
        smc.run(KEY, target_of("table", "reward"), num_particles=4, resampler=floats)
    with pytest.raises(ValueError, match="expected resampler to be a function"):
        check_resampler("systematic", key=KEY)  # pyright: ignore[reportArgumentType]
