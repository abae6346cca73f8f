"""Samplers of strings are calibrated too: a string is drawn from p, seen through noise, and its
posterior p(z) p(y | z) / Z by SMC and by suffix chains; its length, score and log p are ranked.

Few strings are likely, so that ranks have many ties.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import Partial

import ppl
from amortized.calibration import joint, sbc, tarp
from ppl.sequences import Sequences
from samplers import smc
from samplers.draws import ancestral
from samplers.mcmc import suffix
from tests.helpers import MAX_TOKENS, PROMPT, hmm
from tests.samplers.problems import score_arrays

NUM, SAMPLES, NOISE = 1_000, 9, 0.4


def plain() -> Any:
    return hmm().given(PROMPT, max_tokens=MAX_TOKENS)


def log_likelihood(y: Any, tokens: Any, length: Any) -> Any:
    """log p(y | z), up to a constant."""
    return -0.5 * ((y - 1.5 * score_arrays(tokens, length)) / NOISE) ** 2


def posterior(y: Any) -> Any:
    return plain() * ppl.reward(Partial(log_likelihood, y))


def numbers(x: Sequences) -> dict[str, Any]:
    """What is ranked of strings."""
    return {
        "length": x.length,
        "log p": plain().log_density(x.tokens, x.length),
        "score": score_arrays(x.tokens, x.length),
    }


def simulate(key: Any) -> Any:
    string_key, noise_key = jax.random.split(key)
    z = ancestral.run(string_key, plain(), num_samples=1).sequences
    y = 1.5 * score_arrays(z.tokens, z.length)[0] + NOISE * jax.random.normal(noise_key)
    return jax.tree.map(lambda leaf: leaf[0], numbers(z)), y


def by_smc(key: Any, y: Any, num_samples: int, *, weight: Any) -> Any:
    """Draws from a population, by its weights to the power `weight`."""
    run_key, draw_key = jax.random.split(key)
    out = smc.run(run_key, posterior(y), num_particles=128)
    rows = jax.random.categorical(draw_key, weight * out.log_weights, shape=(num_samples,))
    return numbers(jax.tree.map(lambda leaf: leaf[rows], out.sequences))


def by_suffix(key: Any, y: Any, num_samples: int, *, moves: Any) -> Any:
    """A chain for each draw, all from one bad start: the empty string."""
    kernel = suffix.kernel(posterior(y))
    start = Sequences(
        jnp.full((num_samples, MAX_TOKENS), hmm().eos, jnp.int32), jnp.zeros(num_samples, jnp.int32)
    )

    def step(i: Any, state: Any) -> Any:
        return kernel.step(jax.random.fold_in(key, i), state)[0]

    return numbers(jax.lax.fori_loop(0, moves, step, kernel.init(start)).sequences)


def agreement(theta: Any, y: Any) -> dict[str, Any]:
    """log p(y | z), which depends on y: a sampler of p itself has uniform ranks of all others."""
    return {"log p(y | z)": -((y - 1.5 * theta["score"]) ** 2)}


def joint_of(sampler: Callable[..., Any]) -> joint.Joint:
    hmm()  # kept, and so not to be made first where it is traced
    return joint.draw(
        jax.random.key(17),
        simulate,
        sampler,
        num_simulations=NUM,
        num_samples=SAMPLES,
        batch_size=250,
    )


SAMPLERS = {
    "smc": (Partial(by_smc, weight=jnp.float32(1)), True),
    "smc, weights dropped": (Partial(by_smc, weight=jnp.float32(0)), False),
    "suffix": (Partial(by_suffix, moves=jnp.int32(40)), True),
    "suffix, too few moves": (Partial(by_suffix, moves=jnp.int32(2)), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_of_strings_are_calibrated(name: str):
    sampler, right = SAMPLERS[name]
    them = joint_of(sampler)
    of_x = sbc.run(jax.random.key(2), them, quantities=agreement)
    assert (of_x.p_value > 1e-3) == right, of_x.p_value
    if right:
        out = sbc.run(jax.random.key(1), them)
        assert out.names == ("length", "log p", "score")
        assert out.p_value > 1e-3, dict(zip(out.names, out.p_values, strict=True))
        assert tarp.run(jax.random.key(3), them).p_value > 1e-3
