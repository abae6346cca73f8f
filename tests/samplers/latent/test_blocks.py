"""Chains over latents and text against a joint posterior in closed form: a conjugate latent, and
enumerated strings.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ppl
from ppl.exact import enumerate_strings
from ppl.rows import take_rows
from ppl.sequences import Sequences
from samplers import base, kernels
from samplers.base import Kernel
from samplers.latent import blocks
from samplers.mcmc import suffix
from samplers.smc import conditional
from tests.helpers import assert_z
from tests.samplers.chains import chi_square_z, suffix_chain
from tests.samplers.problems import target_of

COUNTS = np.array([2, 5])
SHAPE, RATE = 2.0, 1.5


def model(target: Any, counts: Any) -> None:
    """Counts whose mean grows with the text: the latent is positive, and conjugate given
    the text.
    """
    speed = numpyro.sample("speed", dist.Gamma(SHAPE, RATE))
    tokens = numpyro.sample("text", ppl.Text(target))
    size = 0.2 + (tokens != target.lm.eos).sum()
    numpyro.deterministic("mean", speed * size)
    with numpyro.plate("data", len(counts)):
        numpyro.sample("counts", dist.Poisson(speed * size), obs=counts)


@functools.cache
def text_target() -> Any:
    return target_of("table", "power")


@functools.cache
def joint() -> blocks.Joint:
    return blocks.joint(model, text_target(), COUNTS)


@dataclasses.dataclass(frozen=True)
class Truth:
    """The strings, their posterior law [M], and given each the Gamma law (shape, rate [M]) of the
    latent.
    """

    sequences: Sequences
    probs: np.ndarray
    shape: float
    rate: np.ndarray

    def mean(self, of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
        """Of a function of (speed, length), by quadrature at quantiles."""
        from scipy.stats import gamma

        at = (np.arange(4000) + 0.5) / 4000
        speed = gamma.ppf(at[:, None], self.shape, scale=1 / self.rate)
        return float((of(speed, np.asarray(self.sequences.length)) @ self.probs).mean())


@functools.cache
def truth() -> Truth:
    exact = enumerate_strings(text_target())
    size = 0.2 + np.asarray(exact.sequences.length)
    shape, rate = SHAPE + COUNTS.sum(), RATE + len(COUNTS) * size
    log_marginal = COUNTS.sum() * np.log(size) - shape * np.log(rate)
    log_pi = exact.log_gamma + log_marginal
    probs = np.exp(log_pi - np.logaddexp.reduce(log_pi))
    return Truth(exact.sequences, probs, shape, rate)


MOMENTS: dict[str, Callable[..., Any]] = {
    "speed": lambda speed, length: speed,
    "log speed": lambda speed, length: np.log(speed),
    "length": lambda speed, length: length + 0 * speed,
    "empty": lambda speed, length: (length == 0) + 0 * speed,
    "product": lambda speed, length: speed * length,
}


def check_posterior(chain: Any, num_chains: int, num_steps: int = 2) -> blocks.State:
    """From exact draws of the joint posterior nothing changes on average: moments, and the law of
    strings.
    """
    rng, law = np.random.default_rng(0), truth()
    row = rng.choice(len(law.probs), num_chains, p=law.probs)
    speed, x = rng.gamma(law.shape, 1 / law.rate[row]), take_rows(law.sequences, jnp.asarray(row))
    position = jnp.asarray(np.log(speed)[:, None], jnp.float32)
    start = chain.init(blocks.State(position, x, joint().values(position, x)))
    step = jax.jit(chain.step)
    state = start
    for key in jax.random.split(jax.random.key(1), num_steps):
        state, _ = step(key, state)
    after, length = (
        np.asarray(leaf, np.float64) for leaf in (state.latents["speed"], state.sequences.length)
    )
    np.testing.assert_allclose(state.latents["mean"], after * (0.2 + length), rtol=1e-5)
    np.testing.assert_allclose(np.exp(state.position[:, 0]), after, rtol=1e-5)
    before = np.asarray(x.length)
    assert (length != before).mean() > 0.05 and (after != np.float32(speed)).mean() > 0.2
    # What the start happened to be cancels.
    for of in MOMENTS.values():
        assert_z(of(after, length) - of(speed, before), 0.0, resolution=4 / num_chains**0.5)
    index = enumerate_strings(text_target()).index(state.sequences.tokens)
    for common in np.argsort(law.probs)[-10:]:
        assert_z(1.0 * (index == common) - (row == common), 0.0, resolution=1 / num_chains**0.5)
    return state


def walk(log_density: Any, dim: int) -> Any:
    return blackjax.additive_step_random_walk(
        log_density, lambda key, z: 0.7 * jax.random.normal(key, z.shape)
    )


def independence(target: Any) -> Kernel:
    """Metropolis-Hastings with strings drawn from a table of all, at random."""
    strings = truth().sequences

    def sample(key: Any, x: Sequences) -> tuple[Sequences, Any]:
        num = x.length.shape[0]
        y = take_rows(strings, jax.random.randint(key, (num,), 0, len(truth().probs)))
        log_density = lambda x: target.log_density(x.tokens, x.length)  # noqa: E731
        return y, log_density(y) - log_density(x)

    return kernels.mh(base.Move(sample))


def three(target: Any) -> Kernel:
    return kernels.repeat(suffix.kernel(target), 3)


@pytest.mark.slow
def test_alternating_blocks_leave_the_joint_posterior_invariant():
    check_posterior(blocks.kernel(joint(), text_kernel=independence, latent_kernel=walk), 40_000, 4)


@pytest.mark.slow
def test_nuts_and_suffix_moves():
    """Also: strings that stayed are scored for the latents that moved, by which the next one is
    accepted.
    """
    state = check_posterior(blocks.kernel(joint(), text_kernel=three), 2000)
    fresh = suffix.kernel(joint().given(state.position)).init(state.sequences)
    np.testing.assert_allclose(state.text.log_phi, fresh.log_phi, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_particle_gibbs_on_the_text():
    """Chains one after another, each with a population of its own."""
    csmc = functools.partial(conditional.kernel, num_particles=4)
    check_posterior(
        blocks.kernel(joint(), text_kernel=csmc, latent_kernel=walk, batch_size=5000), 5000, 4
    )


@pytest.mark.slow
def test_chains_start_with_draws_from_the_model():
    start = joint().start(jax.random.key(3), 4000)
    speed = np.asarray(start.latents["speed"], np.float64)
    assert_z(speed, SHAPE / RATE, resolution=0.02)
    assert_z(speed**2, SHAPE * (SHAPE + 1) / RATE**2, resolution=0.1)
    model_law = enumerate_strings(dataclasses.replace(text_target(), alpha=None))
    counts = np.bincount(model_law.index(start.sequences.tokens), minlength=len(model_law.probs))
    assert chi_square_z(counts[None], model_law.probs[None]) < 4


def test_a_population_as_large_as_the_number_of_chains_is_not_taken_for_it():
    of = joint()
    start = of.start(jax.random.key(0), 4)
    blocks.kernel(of, text_kernel=three).init(start)
    for num in (3, 4):
        csmc = functools.partial(conditional.kernel, num_particles=num)
        with pytest.raises(ValueError, match=f"one string for each of .*, got one with {num};"):
            blocks.kernel(of, text_kernel=csmc).init(start)
    # With one more than there are chains the run itself says so.
    potential = of.given(jnp.zeros((4, 1))).potential
    with pytest.raises(ValueError, match="one string for each of 4 chains, got one with 5"):
        potential.final(potential.init(5))


def test_a_chain_state_of_several_rows_is_not_taken_apart():
    twice = Kernel(lambda x: take_rows(x, jnp.zeros(2, jnp.int32)), lambda key, x: (x, None))
    chain = blocks.kernel(joint(), text_kernel=lambda target: twice, batch_size=1)
    with pytest.raises(ValueError, match="a chain state of one row per chain, got 2 rows for one"):
        chain.init(joint().start(jax.random.key(0), 4))


# --- the pieces ---


@pytest.mark.slow
def test_the_text_block_enumerated():
    """At every point of a grid of latents: |pi K - pi| <= 1e-12, and pi is the conditional law of
    strings.
    """
    from scipy.stats import poisson

    exact = enumerate_strings(text_target())
    length = np.asarray(exact.sequences.length)
    for speed in (0.3, 2.2):
        chain = suffix_chain(joint().given(jnp.full((1, 1), math.log(speed))))
        assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12
        log_pi = exact.log_gamma + poisson.logpmf(COUNTS, speed * (0.2 + length[:, None])).sum(1)
        np.testing.assert_allclose(
            chain.pi, np.exp(log_pi - np.logaddexp.reduce(log_pi)), atol=1e-6
        )


@pytest.mark.slow
def test_the_joint_density_and_the_rescored_text():
    """log f is NumPyro's density without the text's own; new latents change log Phi, and take no
    pass of the model.
    """
    alive = np.flatnonzero(truth().probs > 0)
    x, positions = (
        take_rows(truth().sequences, jnp.asarray(alive)),
        jnp.linspace(-1, 1, len(alive))[:, None],
    )
    found = jax.vmap(joint().log_density)(positions, x.tokens)
    speed, size = np.exp(np.asarray(positions)), 0.2 + np.asarray(x.length)[:, None]
    expected = dist.Poisson(speed * size).log_prob(COUNTS).sum(1) + dist.Gamma(
        SHAPE, RATE
    ).log_prob(speed[:, 0])
    np.testing.assert_allclose(found, expected + positions[:, 0], rtol=1e-4, atol=1e-4)
    before, after = joint().given(0 * positions), joint().given(positions)
    state = suffix.kernel(before).init(x)
    fresh, moved = (
        suffix.kernel(after).init(x),
        blocks._rescored(suffix.kernel(after), after, state),
    )
    np.testing.assert_allclose(moved.log_phi, fresh.log_phi, rtol=1e-5, atol=1e-5)
    assert moved.log_p is state.log_p and np.abs(moved.log_phi - state.log_phi).max() > 0.5


def wrong_rows(patch: pytest.MonkeyPatch) -> None:
    given = blocks.Joint.given
    patch.setattr(
        blocks.Joint, "given", lambda self, position: given(self, jnp.roll(position, 1, axis=0))
    )


def text_ignored(patch: pytest.MonkeyPatch) -> None:
    """Latents move as if the text were another chain's."""
    density = blocks.Joint.log_density
    patch.setattr(
        blocks.Joint,
        "log_density",
        lambda self, z, tokens: density(self, z, jnp.full_like(tokens, 2)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("plant", [wrong_rows, text_ignored], ids=lambda f: f.__name__)
def test_a_planted_fault_fails(plant: Any, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)
    chain = blocks.kernel(
        joint(), text_kernel=lambda target: independence(target), latent_kernel=walk
    )  # traced anew
    with pytest.raises(AssertionError, match="z = "):
        check_posterior(chain, 3000)


# --- bad input ---


def two_texts(p: Any, seen: Any) -> None:
    numpyro.sample("first", ppl.Text(p))
    model(p, seen)


def no_text(p: Any, seen: Any) -> None:
    numpyro.sample("seen", dist.Normal(numpyro.sample("x", dist.Normal()), 1.0), obs=seen)


def tempered_by_a_latent(p: Any, seen: Any) -> None:
    alpha = numpyro.sample("alpha", dist.Gamma(2.0, 1.0))
    numpyro.sample("text", ppl.Text(p**alpha))
    numpyro.sample("seen", dist.Poisson(alpha), obs=seen)


def a_topic(p: Any, seen: Any) -> None:
    topic = numpyro.sample("topic", dist.Bernoulli(0.4))
    numpyro.sample("text", ppl.Text(p))
    numpyro.sample("seen", dist.Poisson(1.0 + topic), obs=seen)


def only_text(p: Any, seen: Any) -> None:
    tokens = numpyro.sample("text", ppl.Text(p))
    numpyro.sample("seen", dist.Poisson(1.0 + tokens[0]), obs=seen)


BAD: dict[str, tuple[Any, str]] = {
    "two texts": (
        two_texts,
        r"one latent text site, .*got \['first', 'text'\]; condition the others",
    ),
    "no text": (no_text, r"one latent text site, .*got \[\]"),
    "a target with latents": (
        tempered_by_a_latent,
        "target does not depend on latents, got 'text'; write ppl.Text",
    ),
    "discrete": (a_topic, r"continuous latent sites, got discrete \['topic'\]; sum them out"),
    "nothing else": (only_text, r"latent and observed sites, got latent \[\]"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_models(name: str):
    bad, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        blocks.joint(bad, target_of("table", "plain"), COUNTS)


@pytest.mark.bad_input
def test_bad_options():
    with pytest.raises(ValueError, match="expected batch_size"):
        blocks.kernel(joint(), batch_size=0)
