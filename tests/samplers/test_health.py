"""What speaks against a population: each flag from numbers made up for it, and none without."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl.sequences import Sequences
from samplers import diagnostics, smc
from samplers.base import Cost
from samplers.results import Trace, Weighted
from samplers.strings import proposals
from tests.samplers.problems import plain

GAMMA = np.log([0.2, 0.1, 0.1, 0.05])


def population(**changes: Any) -> Weighted:
    """Four different strings, each of which has stood for what it weighs."""
    tokens = jnp.array([[0, 1], [2, 1], [3, 1], [3, 3]], jnp.int32)
    weights = np.exp(GAMMA) / np.exp(GAMMA).mean()
    sound = Weighted(
        samples=Sequences(tokens, jnp.array([1, 1, 1, 2], jnp.int32)),
        log_weights=jnp.asarray(np.log(weights), jnp.float32),
        log_z=jnp.float32(np.log(0.45)),
        log_z_std_error=jnp.float32(0.2),
        num_roots=jnp.int32(3),
        num_invalid=jnp.int32(0),
        rounds=jnp.int32(2),
        cost=Cost(),
        trace=Trace(ess=jnp.ones(2), log_z=jnp.zeros(2), resampled=jnp.zeros(2, bool)),
        log_density=jnp.asarray(GAMMA, jnp.float32),
    )
    return dataclasses.replace(sound, **changes)


def test_nothing_speaks_against_a_sound_one():
    found = diagnostics.health(population())
    assert found.ok and str(found) == "nothing speaks against log Z"
    # An exact one is sound however few strings there are, and one that cannot tell its error.
    for error in (0.0, np.inf):
        assert population(log_z_std_error=jnp.float32(error)).health.ok


COPIES = Sequences(jnp.full((4, 2), 3, jnp.int32), jnp.full(4, 2, jnp.int32))
EVEN = jnp.zeros(4, jnp.float32)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "dead": ({"log_weights": jnp.full(4, -jnp.inf)}, "all particles are dead"),
    "one_root": ({"num_roots": jnp.int32(1)}, "descends from one particle"),
    "uncertain": ({"log_z_std_error": jnp.float32(0.41)}, "standard error of log Z is 0.41"),
    "dropped": ({"details": {"dropped": jnp.float32(0.21)}}, "might have been 21 % of it"),
    "few_strings": (
        {"samples": COPIES, "log_weights": EVEN, "log_density": jnp.full(4, -3.0)},
        "copies of 1.0 different strings",
    ),
    # 0.45 in hand; 0.45 / e^0.11 is below that by more than rounding.
    "below_strings": ({"log_z": jnp.float32(np.log(0.45) - 0.11)}, "weigh 0.1 nats more"),
    "truncated": ({"missing_support": jnp.float32(0.25)}, "up to 0.25 of what the target"),
    "invalid": ({"num_invalid": jnp.int32(7)}, "NaN or +inf 7 times"),
}


@pytest.mark.parametrize("flag", CASES)
def test_each_flag_is_raised_by_what_it_is_about(flag: str):
    changes, words = CASES[flag]
    found = diagnostics.health(population(**changes))
    raised = [f.name for f in dataclasses.fields(found) if getattr(found, f.name) is True]
    assert raised == [flag] and len(found.words) == 1 and words in str(found)
    assert not found.ok and str(found).startswith("log Z is not to be trusted: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"log_z_std_error": jnp.float32(0.39)},
        {"num_roots": jnp.int32(2)},
        {"details": {"dropped": jnp.float32(0.19)}},
        {"log_z": jnp.float32(np.log(0.45) - 0.09)},
        # Unlike tokens after the end make no string another one, and copies count once.
        {"samples": COPIES, "log_weights": EVEN, "log_z": jnp.float32(np.log(0.2))},
    ],
)
def test_short_of_it_no_flag_is_raised(changes: dict[str, Any]):
    found = diagnostics.health(population(**changes))
    assert not (found.uncertain or found.one_root or found.below_strings or found.dropped)


def test_where_independent_particles_all_go_one_way_the_default_does_not():
    """Token 2 is likely first, and from there on little is; 3 is the way to a certain end.  At
    alpha = 8 all independent particles take 2, and know nothing of the other.
    """
    rows = [[0.1, 0.1, 0.5, 0.3], [0.25] * 4, [0.3, 0.1, 0.3, 0.3], [0.01, 0.97, 0.01, 0.01]]
    target = tabular.markov(jnp.array(rows), eos=1).given([0], max_tokens=4) ** 8 * ppl.must_end()
    truth = float(ppl.exact.enumerate_strings(target).log_z)
    low = smc.run(jax.random.key(0), target, num_particles=8, proposal=proposals.locally_optimal)
    ours = smc.run(jax.random.key(0), target, num_particles=8)
    assert float(low.log_z) < truth - 3 and not low.health.ok
    assert abs(float(ours.log_z) - truth) < 0.1 and ours.health.ok


SEEN: list[str] = []


def test_it_is_shown():
    bad = population(num_invalid=jnp.int32(7))
    assert "health=log Z is not to be trusted: a factor raised" in repr(bad)
    assert "health=nothing speaks against log Z" in repr(population())
    jax.jit(lambda out: SEEN.append(repr(out)))(bad)
    assert SEEN and "health" not in SEEN[0] and "health" not in repr(jax.eval_shape(lambda: bad))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), bad)
    assert "health" not in repr(many)

    class Letters:
        def decode(self, ids: Any) -> str:
            return str(list(ids))

    assert "not to be trusted: a factor raised" in str(ppl.table(bad, Letters()).caption)
    assert ppl.table(population(), Letters()).caption == f"log Z = {np.log(0.45):.3f}"


def test_what_is_no_single_population_is_refused():
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), population())
    with pytest.raises(ValueError, match=r"one population .* got \(2, 4\)"):
        diagnostics.health(many)


def test_rows_that_are_no_strings_have_no_copies():
    latent = dataclasses.replace(population(log_density=None), samples={"mu": jnp.zeros(4)})
    assert diagnostics.health(latent).ok


def test_smc_says_what_its_strings_weigh_and_how_many_roots_are_left():
    """The density in the result is the referee's, and roots are counted by replaying the
    genealogy.
    """
    target = plain("table") * ppl.reward(lambda tokens, length: 0.7 * length)
    out = smc.run(jax.random.key(5), target, num_particles=6, threshold=0.95, history=True)
    density = target.log_density(out.sequences.tokens, out.sequences.length)
    assert out.log_density is not None and out.history is not None
    np.testing.assert_allclose(out.log_density, density, atol=1e-5)
    roots = diagnostics.roots(out.history.ancestors)
    assert out.num_roots is not None and out.trace.resampled.any()
    assert int(out.num_roots) == len(set(np.asarray(roots).tolist()))


def test_one_dead_particle_is_no_dead_population():
    """The last of the four strings is lost, and the others weigh .4."""
    alive = np.array([True, True, True, False])
    weights, density = (np.where(alive, x, -np.inf) for x in (population().log_weights, GAMMA))
    changes = {"log_weights": weights, "log_density": density, "log_z": jnp.float32(np.log(0.4))}
    assert diagnostics.health(population(**changes)).ok
